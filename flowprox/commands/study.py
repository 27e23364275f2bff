"""The command ``flowprox study``."""

from __future__ import annotations

from flowprox.evaluation_options import ImageOptions

__all__ = ["study"]

_IMAGES = ImageOptions()


def study(
    name: str | None = None,
    out: str | None = None,
    scale: str = "small",
    flow: str = "glow-faces64",
    images: ImageOptions = _IMAGES,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw a figure of the papers that is no table: latent norms, loss landscapes, solver curves. Without a name: list them.

    An interrupted study is continued by the same command.

    Arguments:
        name: the study; without one all are listed.
        out: folder of the records and figures; by default runs/study-NAME.
        scale: "smoke" (seconds), "small" (minutes on two cores) or "paper".
        flow: the prior: a shipped model (see "flowprox models"), a folder, or a hub id.
        images: the images; size and, unless given, number are those of the scale.
        seed: of everything random.
        device: cpu, cuda or mps.
    """
    from flowprox.studies import STUDIES, StudyOptions, run_study

    if name is None:
        for known, listed in STUDIES.items():
            print(f"{known:16} {listed.description} ({listed.source})")
        return
    folder = out or f"runs/study-{name}"
    records = run_study(name, folder, StudyOptions(scale, flow, images, seed, device))
    print(f"{len(records)} records and figures: {folder}")
