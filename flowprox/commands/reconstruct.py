"""The command that reconstructs files."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flowprox.commands.terminal import check_device, check_inputs, check_models, key_values, mean, print_table
from flowprox.naming import Values, digits

_RARE = 1e-3  # of a residual's p-value: an honest estimate has a larger one almost always
_N_NAMED = 5


@dataclass
class ReconstructOptions:
    """What to reconstruct, with what, from what.

    Arguments:
        inputs: image files, slices (.dcm, .nii, TIFF), measured arrays (.npy, .mat, .h5), folders of these; before an option
            of several words, or after "--".
        out: folder to fill: images, measurements, records.jsonl with the figures, and from posterior the deviations.
        model: the trained network: a shipped model (see "flowprox models"), a folder, or hf:ORG/NAME. Alone it means
            method unfolded.
        method: how; "flowprox methods" lists them.
        flow: the prior of latent-map, noise-map, posterior and plug-and-play: a shipped model, a folder, or hf:ORG/NAME;
            by default glow-faces64.
        noise: density of the noise, for noise-map and posterior: a flow trained on noise (a shipped model such as
            noise-mnist64, a folder or hf:ORG/NAME), or a name with KEY=VALUE ... (gaussian, sinusoidal, radial); by
            default the noise of the problem.
        intervals: folder of calibrated intervals of the trained network, from flowprox calibrate: writes the lower and the
            upper end for each pixel, and a picture of the half-widths.
        samples: how many images of the posterior to draw with a trained network whose calibration has a density: writes
            samples/NAME/0.png, ..., and the deviation of each pixel.
        options: KEY=VALUE ... of the method; "flowprox methods NAME" lists them.
        problem: what was measured; "flowprox problems" lists them; by default the one in the model's card.
        parameters: KEY=VALUE ... of the problem; "flowprox problems NAME" lists them.
        size: height and width, or channels, height and width, of the image behind measurements that do not show it
            (compressed sensing, MRI, CT); by default those of the flow.
        measured: image files are measurements, not clean images; arrays always are.
        simulate: image files are clean images: degrade them first and compare.
        overwrite: remove the images of an earlier job from out and begin anew.
        seed: of the noise; each image's own follows from it and the file's name.
        operator_seed: of what is drawn with the operator, such as a mask or matrix; by default the one in the model's
            card.
        pad: extend images whose sides the model cannot take, and crop back; --no-pad refuses them.
        device: cpu, cuda or mps.
    """

    inputs: list[str]
    out: str
    model: str | None = None
    method: str | None = None
    flow: str | None = None
    noise: list[str] | None = None
    intervals: str | None = None
    samples: int = 0
    options: list[str] | None = None
    problem: str | None = None
    parameters: list[str] | None = None
    size: list[int] | None = None
    measured: bool = False
    simulate: bool = False
    overwrite: bool = False
    seed: int = 0
    operator_seed: int | None = None
    pad: bool = True
    device: str = "cpu"


def reconstruct(options: ReconstructOptions) -> None:
    """Reconstruct images or measurements with a trained network, a flow as it is, or a classical method.

    Pictures are the measurements where a model is used by itself; with --simulate, or a method by name, they are clean images,
    which are measured first and compared with what is reconstructed from that. The same command continues an earlier run.
    """
    parameters = key_values(options.parameters, "parameters")
    of_method = key_values(options.options, "options")
    of_noise = key_values((options.noise or [])[1:], "noise")
    noise = (
        {"name": options.noise[0], **of_noise} if options.noise and of_noise else next(iter(options.noise or []), None)
    )
    if options.measured and options.simulate:
        raise ValueError("--measured and --simulate exclude each other; give one of them")
    check_device(options.device)
    check_inputs(options.inputs)
    check_models(options.model, options.flow, options.intervals)
    from rich.console import Console

    from flowprox.naming import require_device
    from flowprox.reconstruction import ReconstructionJob, reconstruct_files

    require_device(options.device)
    alike = {field.name: getattr(options, field.name) for field in fields(ReconstructionJob)}
    measured = options.measured or (False if options.simulate else None)
    settings = alike | {"parameters": parameters, "measured": measured, "noise": noise, "options": of_method}
    job = ReconstructionJob(**settings)
    records = reconstruct_files(
        job, options.inputs, options.out, overwrite=options.overwrite, console=Console(stderr=True)
    )
    print_table(*_results(records))
    _print_notes(records)
    print(f"written to {options.out}")


def _results(records: list[Values], n_shown: int = 40) -> tuple[list[str], list[list[str]]]:
    figures = {"PSNR (dB)": ("psnr", 2), "SSIM": ("ssim", 3)} if any("psnr" in record for record in records) else {}
    figures |= {"seconds": ("seconds", 3)}
    rows = []
    for record in records[:n_shown]:
        size = f"{record['height']}x{record['width']}"
        rows.append([record["image"], size, *(digits(record.get(key), n) for key, n in figures.values())])
    if len(records) > n_shown:
        rows.append([f"... {len(records) - n_shown} more", *[""] * (1 + len(figures))])
    rows.append([f"mean of {len(records)}", "", *(digits(mean(records, key), n) for key, n in figures.values())])
    return ["image", "height x width", *figures], rows


def _print_notes(records: list[Values]) -> None:
    """What the figures do not tell."""
    parameters = ", ".join(f"{key} {value}" for key, value in records[0]["parameters"].items())
    print(f"problem {records[0]['problem']}: {parameters}")
    for assumption in records[0]["assumed"]:
        print(f"assumed: {assumption}")
    if interval := records[0].get("intervals"):
        covered = mean([record["intervals"] for record in records], "coverage")
        print(
            f"intervals for {1 - interval['alpha']:.0%} of the pixels on average, half-width "
            f"{digits(mean([record['intervals'] for record in records], 'mean_half_width'), 4)}"
            + ("" if covered is None else f"; here they hold {covered:.1%}")
        )
    unmixed = [record for record in records if str(record.get("reason", "")).startswith("not mixed")]
    if unmixed:
        print(
            f"the chains of {len(unmixed)} of {len(records)} images have not mixed ({unmixed[0]['image']}: "
            f"{unmixed[0]['reason']}): mean and deviations are rough; give --options more n_warmup and n_samples"
        )
    _print_doubts(records)
    if any(record.get("scaled_to_fit") for record in records):
        print("signs do not tell the scale of an image: estimates were scaled to fit before they were compared")


def _print_doubts(records: list[Values]) -> None:
    """Which results are not to be trusted, and why."""
    from flowprox.methods import METHODS

    # of a calibrated network the usual residual is known; methods without a trained prior leave what their own weight leaves
    is_tested = "alarm" not in records[0] and METHODS.get(records[0]["method"], METHODS["unfolded"]).parts
    unexplained = [record for record in records if is_tested and record.get("residual_p_value", 1) < _RARE]
    alarming = [record for record in records if record.get("alarm", {}).get("raised")]
    for record in alarming[:_N_NAMED]:
        p_values = {key: value for key, value in record["alarm"].items() if key != "raised"}
        unlikely = min(p_values, key=lambda key: p_values[key])
        print(
            f"not to be trusted: {record['image']}, unlike the images of the calibration in its {unlikely} "
            f"(p {p_values[unlikely]:.2g})"
        )
    for record in unexplained[:_N_NAMED]:
        print(
            f"not to be trusted: {record['image']}, the measurement is further from it than the stated noise explains "
            f"(p {record['residual_p_value']:.2g}): the noise level, the operator or the method does not fit"
        )
    n = len(alarming) + len(unexplained)
    if n > _N_NAMED:
        print(f"{n} of {len(records)} images are not to be trusted; records.jsonl names them")
