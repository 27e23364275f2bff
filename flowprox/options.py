"""The settings of training runs and evaluations, and what a run came to, as plain typed records.

The command line and the YAML recipes are made from these classes: each field is an option or key of the same name. Nothing
heavy is imported here: ``flowprox --help`` stays fast. A wrong value raises when the record is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from flowprox.naming import Values

SAMPLES = "samples"
"""The source that stands for the pictures that ship with the package."""

Grid: TypeAlias = dict[str, list[Any]]
"""Values to take in turn, by the name of a parameter or an option."""


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def _is_range(value: list[float]) -> bool:
    return len(value) == 2 and 0 <= value[0] <= value[1]


_COUNTS = """image_size limit n_scales projection_steps latent_size hidden_channels discriminator_channels n_folds batch_size
    validate_every n_validation_images devices num_nodes max_steps num_threads""".split()
_POSITIVE = ("step_size", "penalty", "shrinkage", "learning_rate", "max_epochs")
_NOT_NEGATIVE = """patches likelihood_weight latent_weight weight_norm_penalty scalar_learning_rate weight_decay
    warmup_steps gradient_clip skip_above n_rollbacks patience checkpoint_every n_pictures""".split()

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_COUNTS, (lambda value: value >= 1, "be at least 1")),
    **dict.fromkeys(_POSITIVE, (lambda value: value > 0, "be positive")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda value: value >= 0, "be 0 or more")),
    "channels": (lambda value: value in (1, 3), "be 1 or 3"),
    "bit_depth": (lambda value: 1 <= value <= 8, "be between 1 and 8"),
    "noise_range": (_is_range, "be two numbers, low <= high, both >= 0"),
    "betas": (lambda value: len(value) == 2 and all(0 <= b < 1 for b in value), "be two numbers from 0 to below 1"),
    "ema_decay": (lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    "teacher_weight": (lambda value: 0 < value <= 1, "lie in (0, 1]"),
    "loss": (lambda value: value in ("mse", "log-mse"), 'be "mse" or "log-mse"'),
}
"""What holds of an option in every record that has it, where it is not null; and the words for it."""


@dataclass
class _Record:
    """A record that checks its options when it is made."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            holds, rule = _RULES.get(name, (None, ""))
            require(holds is None or value is None or holds(value), f"{name} must {rule}, got {value!r}")


def parse_duration(value: str | float | int, name: str = "max_time") -> float:
    """Seconds in ``"HH:MM:SS"``, ``"DD:HH:MM:SS"``, ``"MM:SS"`` or a plain number of seconds; ValueError for another form.

    Example:
        >>> parse_duration("00:10:00")
        600.0
    """
    parts = str(value).split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    require(
        1 <= len(numbers) <= 4 and all(number >= 0 for number in numbers),
        f'{name} must look like "HH:MM:SS" or be a number of seconds; got {value!r}',
    )
    factors = (86400.0, 3600.0, 60.0, 1.0)[4 - len(numbers) :]
    seconds = sum(number * factor for number, factor in zip(numbers, factors, strict=True))
    require(seconds > 0, f"{name} must be positive; got {value!r}")
    return seconds


@dataclass
class DataOptions(_Record):
    """Which images to train and validate on.

    Arguments:
        train: a folder of images, an .npz shard, a glob of shards, or a list of these.
        validation: the same for validation. null takes the validation part of a folder's own split; with anything but
            folders it trains without validation.
        image_size: height and width in pixels; larger images are cropped and resized.
        channels: 3 for color, 1 for gray.
        patches: cut so many random squares out of every image at its own resolution, in place of the whole image resized; 0
            takes the whole image.
        limit: use only the first so many training images; None uses all.
        skip_corrupt: report and skip unreadable images instead of stopping at the first.
        terms: under which terms the images may be used; written into the model's card.
    """

    train: str | list[str]
    validation: str | list[str] | None = None
    image_size: int = 64
    channels: int = 3
    patches: int = 0
    limit: int | None = None
    skip_corrupt: bool = False
    terms: str | None = None


@dataclass
class NoiseOptions(_Record):
    """Which noise a flow is to learn; every batch of it is drawn anew.

    Arguments:
        name: a noise of ``flowprox.noise``: gaussian, sinusoidal, radial or mnist.
        parameters: what differs from the noise's defaults, for example {sigma: 0.5}.
        validation: parameters that differ again for validation, for example {split: validation}.
        image_size: height and width of the noise in pixels.
        channels: 3 for color, 1 for gray.
        terms: under which terms what the noise is made of may be used; written into the model's card.
    """

    name: str
    parameters: Values = field(default_factory=dict)
    validation: Values = field(default_factory=dict)
    image_size: int = 64
    channels: int = 3
    terms: str | None = None


@dataclass
class ProblemOptions:
    """The measurement y = A x + noise that a network is trained for.

    Arguments:
        name: a problem of ``flowprox.operators.PROBLEMS``, such as denoising.
        parameters: what differs from the problem's defaults, for example {sigma: 0.25}.
        ranges: what is drawn anew for every image, uniformly between two ends: {sigma: [0, 0.3]} with any problem,
            {mask_size: [8, 24]} (the sides of a hidden rectangle anywhere) and {keep: [0.1, 0.9]} with inpainting.
        seed: seed of whatever is drawn once with the operator, such as a random mask.
    """

    name: str = "denoising"
    parameters: Values = field(default_factory=dict)
    ranges: dict[str, list[float]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ends in self.ranges.items():
            require(_is_range(ends), f"ranges.{name} must be two numbers, low <= high, both >= 0; got {ends}")


@dataclass
class LikelihoodOptions(_Record):
    """How images become continuous before their likelihood is maximized.

    Arguments:
        bit_depth: b; images are quantized to 2^b levels and dequantized, x = (floor(x 2^b) + u) / 2^b, u uniform in [0, 1).
        noise_range: lowest and highest standard deviation of Gaussian noise added to each image, drawn uniformly per
            image; [0, 0] adds none. A flow meant for unfolding should see images as noisy as its folds will.
        weight_norm_penalty: weight, in bits per dimension, of the sum of squared magnitudes of weight-normalized
            convolutions (RealNVP's; Dinh et al. 2017, Sec. 4.1, have 5e-5).
    """

    bit_depth: int = 8
    noise_range: list[float] = field(default_factory=lambda: [0.0, 0.0])
    weight_norm_penalty: float = 0.0


@dataclass
class DenoiserOptions(_Record):
    """A plain network, pre-trained to remove Gaussian noise, to start the folds of an unfolded network from.

    Arguments:
        prox: which network.
        prox_arguments: arguments of its constructor, such as {hidden_channels: 64}.
        noise_range: lowest and highest standard deviation of the noise, drawn uniformly per image.
    """

    prox: Literal["resnet", "unet"] = "unet"
    prox_arguments: Values = field(default_factory=dict)
    noise_range: list[float] = field(default_factory=lambda: [0.0, 0.3])


@dataclass
class GANOptions(_Record):
    """A generative adversarial network: a DCGAN whose discriminator has spectral normalization.

    Arguments:
        latent_size: length of the generator's latent.
        hidden_channels: the generator's width at half the image's resolution; it doubles at each coarser scale.
        discriminator_channels: the same of the discriminator.
        n_scales: doublings from the coarsest map to the image; image_size must be divisible by 2 ** n_scales.
        betas: Adam's two decay rates, for both networks.
        projection_steps: Adam steps with which a validation image is projected onto the generator's range.
    """

    latent_size: int = 100
    hidden_channels: int = 64
    discriminator_channels: int = 64
    n_scales: int = 4
    betas: list[float] = field(default_factory=lambda: [0.5, 0.999])
    projection_steps: int = 100


@dataclass
class UnfoldedOptions(_Record):
    """An unfolded network: n_folds times a gradient step and a learned prox.

    Arguments:
        prox: "flow" (trained), "plug-and-play" (a frozen flow, the same in every fold, only the step sizes and shrinkages
            learned), "resnet" or "unet".
        flow: a pretrained flow (name, hf:ORG/NAME or folder), or a preset or specification as in train-flow to start from
            random weights. Needed by "flow" and "plug-and-play".
        pretrained: what to start from: for "resnet" and "unet" a pretrained prox (folder written by train-denoiser), for
            "flow" an unfolded network (name, hf:ORG/NAME or folder) of the same flows and folds, whose scalars hold for all
            ``levels``, or are interpolated between its own. It may have been trained for another problem: where its data
            steps are of another kind or number their weights are not taken.
        prox_arguments: arguments of the ResNet's or U-Net's constructor when it is not pretrained.
        n_folds: K.
        tied: use the same prox, with the same weights, in every fold.
        adaptation_rank: the folds' flows share the weights of their coupling nets but for a correction of this rank in each
            fold; null leaves every fold its own weights. For "flow" and two folds or more.
        step_size: mu at the start, learned; for "pgd".
        penalty: rho at the start, learned; for "hqs".
        shrinkage: lambda at the start, learned.
        shrink_last: shrink in the last fold too; false is the literal Eq. (12) of Wei et al. (2022).
        final_data_step: one more data step after the last prox; with an exact measurement, as in inpainting, it returns
            the measured pixels.
        base: density of the latent: "gaussian" divides it by 1 + lambda, "laplace" soft-thresholds it.
        channelwise: learn one weight of the shrinkage per latent channel instead of one for all.
        log_determinant: let the prox follow the determinant of the flow too, which Eq. (7) of Wei et al. leaves out; for flows
            of ``backward`` "plain".
        iteration: "pgd" (proximal gradient) or "hqs" (half-quadratic splitting, exact data step).
        start: x_0: "flow" (the most likely latent of the flow, decoded), "adjoint" (A^T y) or "fbp" (filtered backprojection,
            of tomography). null takes the flow where there is one.
        levels: rising noise levels, such as [0.01, 0.05, 0.2], at which the scalars are learned; the network is then told the
            level of a measurement and interpolates. null learns one set for all.
        latent_mean: widths and depths of a network that predicts from the measurement what the latents are shrunk towards,
            {hidden_channels: [64, 128, 128], n_blocks: 1} with one width per level of the flow; every_fold: true predicts it in
            every fold from what the fold's data step gives. null shrinks towards 0.
        loss: "mse", or "log-mse": the logarithm of each image's error, for problems drawn from ``ranges``. Its gradients are
            larger by 1 / error, 300 times at 25 dB: give gradient_clip and skip_above room.
        teacher: an unfolded network (name, hf:ORG/NAME or folder) whose estimates are imitated besides the images themselves.
        teacher_weight: how much of the target the teacher's estimate makes up, between 0 and 1.
        likelihood_weight: weight in the loss of the clean images' bits per dimension, averaged over the folds' flows.
        latent_weight: weight in the loss of how far the folds' latents are from a standard normal distribution, in nats per
            dimension; for "flow", at the cost of half a pass more for each fold.
        learn_operator: learn the blur kernel used in the gradient steps along with the network (Wei et al., Sec. II).
    """

    prox: Literal["flow", "plug-and-play", "resnet", "unet"] = "flow"
    flow: str | Values | None = None
    pretrained: str | None = None
    prox_arguments: Values = field(default_factory=dict)
    n_folds: int = 4
    tied: bool = False
    adaptation_rank: int | None = None
    step_size: float = 0.5
    penalty: float = 0.1
    shrinkage: float = 0.05
    shrink_last: bool = True
    final_data_step: bool = False
    base: Literal["gaussian", "laplace"] = "gaussian"
    channelwise: bool = False
    log_determinant: bool = False
    iteration: Literal["pgd", "hqs"] = "pgd"
    start: Literal["flow", "adjoint", "fbp"] | None = None
    levels: list[float] | None = None
    latent_mean: Values | None = None
    loss: Literal["mse", "log-mse"] = "mse"
    teacher: str | None = None
    teacher_weight: float = 0.5
    likelihood_weight: float = 0.0
    latent_weight: float = 0.0
    learn_operator: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("likelihood_weight", "latent_weight"):
            twice = self.latent_mean is not None and getattr(self, name) > 0
            require(not twice, f"{name} pulls the latents to 0 and latent_mean to the mean: use one of them")
        useful = {"flow": ("flow", "plug-and-play"), "pretrained": ("flow", "resnet", "unet")}
        useful |= {"prox_arguments": ("resnet", "unet")}
        of_flows = ("channelwise", "log_determinant", "adaptation_rank", "latent_mean", "likelihood_weight")
        for name, proxes in {**useful, **dict.fromkeys((*of_flows, "latent_weight"), ("flow",))}.items():
            needless = f'prox "{self.prox}" has no use for {name}, which is for {" and ".join(proxes)}: leave it out'
            require(self.prox in proxes or not getattr(self, name), needless)
        missing = f'prox "{self.prox}" needs flow: the name or folder of a pretrained flow, or its specification'
        require(self.flow is not None or self.prox in ("resnet", "unet"), missing)


@dataclass
class TrainingOptions(_Record):
    """How long, how fast and on what a model is trained. One run, its resumption included, shares the limits below.

    Arguments:
        batch_size: images per step, over all processes.
        optimizer: "adam", or "muon": orthogonalized momentum for the weights of convolutions and Adam for the rest, with the
            same learning rates.
        learning_rate: step size for the weights, at the schedule's peak.
        scalar_learning_rate: the same for the few scalars mu and lambda.
        weight_decay: every step shrinks all weights, biases and scales, but not those scalars nor a start image, by
            1 - rate * weight_decay.
        schedule: shape of the learning rates over the run: "constant", "cosine" (to zero), "one-cycle" (30 % up, 70 % down)
            or "halving" (after each fifth of the run, as in Whang et al. 2021, Table 1). Progress is the larger of
            step / max_steps and elapsed / max_time; with max_time no two runs are equal to the bit.
        warmup_steps: steps over which the rates rise linearly from zero, on top of the schedule.
        gradient_clip: largest allowed norm of all gradients together; 0 never clips.
        skip_above: skip a step whose gradient norm is more than so many times its running average; 0 skips only what is
            not finite. A flow's inverse may amplify an image without bound: one step on it can end a run.
        n_rollbacks: after twenty skipped steps in a row, or a validation far below the best (1 dB; 0.5 bits or nats per
            dimension), the run goes back to its best weights, at half the learning rates; so many times, then it ends.
        ema_decay: decay per step of the running average of the weights, which is what is validated and saved; 0 is off.
        max_steps: stop after so many steps.
        max_epochs: stop after so many passes over the training images.
        max_time: stop after this wall-clock time, "HH:MM:SS" or seconds, summed over resumptions.
        patience: stop when so many validations in a row brought no new best; 0 never stops early.
        validate_every: steps between validations.
        n_validation_images: how many images each validation uses.
        precision: "32", or "bf16" for the convolutional networks in the model; a flow's own arithmetic stays float32.
        accelerator: "cpu", "cuda", "mps" or "auto".
        devices: processes per machine (one device each).
        num_nodes: machines.
        strategy: how processes start: "ddp" (the command is run again for each) or "ddp_spawn"; "auto" is "ddp".
        compile: compile the network with ``torch.compile``, a step of a level or a block at a time; for a GPU. It costs a
            minute at the start. Flows whose ``backward`` is "invert" or "fast-..." are trained as without.
        cuda_graph: record forward and backward pass as CUDA graphs and replay them: one process on an NVIDIA GPU, the same
            operator in every step, no ``backward: invert``; elsewhere the run says so and trains without.
        num_threads: CPU threads per process; null leaves PyTorch's choice. With one, it skips its fast convolutions.
        channels_last: keep images and weights channels-last, the faster layout for convolutions.
        horizontal_flip: mirror half of the training images, drawn anew in every step.
        checkpoint_every: seconds between two writes of the state a run resumes from; 0 writes after every step.
        seed: every random number of the run follows from it.
        progress: show a progress bar on a terminal, elsewhere a line per validation.
        loggers: where figures and sample images go besides the run's folder: "tensorboard", "csv", "wandb" (offline unless
            WANDB_MODE says otherwise), "mlflow" (into the folder unless MLFLOW_TRACKING_URI says otherwise).
    """

    batch_size: int = 16
    optimizer: Literal["adam", "muon"] = "adam"
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    scalar_learning_rate: float = 1e-2
    schedule: Literal["constant", "cosine", "one-cycle", "halving"] = "cosine"
    warmup_steps: int = 0
    gradient_clip: float = 1.0
    skip_above: float = 0.0
    n_rollbacks: int = 3
    ema_decay: float = 0.0
    max_steps: int | None = None
    max_epochs: float | None = None
    max_time: str | float | None = None
    patience: int = 0
    validate_every: int = 500
    n_validation_images: int = 256
    precision: Literal["32", "bf16"] = "32"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "ddp_spawn"] = "auto"
    compile: bool = False
    cuda_graph: bool = False
    num_threads: int | None = None
    channels_last: bool = False
    horizontal_flip: bool = True
    checkpoint_every: float = 300.0
    seed: int = 0
    progress: bool = True
    loggers: list[Literal["tensorboard", "csv", "wandb", "mlflow"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = bool(self.max_steps or self.max_epochs or self.max_time is not None or self.patience)
        require(ends, "the run would never end: set max_steps, max_epochs, max_time or patience")
        if self.max_time is not None:
            parse_duration(self.max_time)
        processes, whole = self.devices * self.num_nodes, "batch_size counts images over all processes"
        shared = self.batch_size % processes == 0
        require(shared, f"{whole}: {self.batch_size} cannot be shared by {processes} processes")


@dataclass
class TrainingResult:
    """What a run came to.

    Arguments:
        folder: the run's folder.
        steps: optimizer steps, skipped ones included.
        skipped: steps that changed nothing, their loss or gradient being not finite or an outlier (``skip_above``).
        elapsed: seconds, summed over resumptions.
        reason: why it ended: "max_steps", "max_epochs", "max_time", "patience" or "signal".
        metrics: the last validation's figures.
        best: the best validation's figures and its step; the model in ``folder/model`` is the one of that step.
    """

    folder: str
    steps: int
    skipped: int
    elapsed: float
    reason: str
    metrics: dict[str, float]
    best: dict[str, float]


# Evaluation ----------------------------------------------------------------------------------------------------------


def _check_lists(name: str, values: Grid, equally_long: bool = True) -> None:
    for key, items in values.items():
        require(isinstance(items, list) and bool(items), f"{name} {key} must be a list of values to try, got {items!r}")
    lengths = {key: len(items) for key, items in values.items()}
    same = not equally_long or len(set(lengths.values())) <= 1
    require(same, f"{name} takes its lists together, so they must be equally long: {lengths}")


@dataclass
class ImageOptions(_Record):
    """Which images an evaluation uses.

    Arguments:
        source: a folder of images, an .npz shard, a glob of either, a list of these, or "samples" for the pictures that
            ship with the package.
        image_size: height and width in pixels; the central square is taken and resized. null keeps images as
            they are, each of its own size.
        channels: 3 for color, 1 for gray.
        split: "train", "val" or "test" for a part of the images, see ``flowprox.data.ImageDataset``; "all" for all.
        limit: use only the first so many.
    """

    source: str | list[str] = SAMPLES
    image_size: int | None = 64
    channels: int = 3
    split: Literal["all", "train", "val", "test"] = "all"
    limit: int | None = None


@dataclass
class EvaluatedProblem:
    """A measurement problem, or a series of them.

    Arguments:
        name: a problem of ``flowprox.operators``.
        parameters: what differs from the problem's defaults.
        series: parameter -> list of values, lists of equal length: one problem for each place in the lists.
        seed: of whatever is drawn once with the operator, such as a random mask or matrix.
        published: label of a method -> published PSNR in dB, shown beside the measured one; a list where there is a series.
        label: what it is called in records and tables; by default its name and parameters. A series appends its values.
        published_in: where the published figures stand, such as "Asim et al. (2020), Fig. 4".
        scales: the scales at which it is used, "small" being the recipe as written; null: all.
    """

    name: str
    parameters: Values = field(default_factory=dict)
    series: Grid = field(default_factory=dict)
    seed: int = 0
    published: Values = field(default_factory=dict)
    label: str | None = None
    published_in: str | None = None
    scales: list[str] | None = None

    def __post_init__(self) -> None:
        _check_lists(f"series of {self.name}:", self.series)
        twice = sorted(set(self.parameters) & set(self.series))
        require(not twice, f"{self.name}: {', '.join(twice)} stands in parameters and in series; leave one out")
        n = len(next(iter(self.series.values()))) if self.series else 1
        for label, figures in self.published.items():
            fits = isinstance(figures, list) and len(figures) == n if self.series else not isinstance(figures, list)
            require(fits, f"published {label} of {self.name} must be {n} figure(s), one per problem; got {figures!r}")
            try:
                [float(figure or 0) for figure in (figures if isinstance(figures, list) else [figures])]
            except (TypeError, ValueError) as error:
                raise ValueError(f"published {label} of {self.name} must be PSNR in dB; got {figures!r}") from error


@dataclass
class EvaluatedMethod(_Record):
    """A reconstruction method, or a series of variants of it.

    Arguments:
        name: a method of ``flowprox.methods``.
        label: what it is called in records and tables; by default its name. A series appends its values.
        flow: the prior, by name, folder or hf:ORG/NAME.
        model: the trained network, by name, folder or hf:ORG/NAME; {problem} in it stands for the name of the problem.
        noise: density of the noise: name, folder or hf:ORG/NAME of a flow trained on noise, or {name: ..., parameters} of
            ``flowprox.noise``; null takes the problem's own.
        options: of the method.
        options_for: label or name of a problem -> options that differ there.
        series: option -> list of values, lists of equal length: one variant for each place in the lists.
        tune: option -> values to choose from by the mean PSNR on ``tune_images``, for each problem apart; with several
            options every combination is tried.
        intervals: of a trained network, by name, folder or hf:ORG/NAME: how well they fit is recorded and drawn in the report.
        operators: what the network is given in place of the measuring operator, one entry for all data steps or one for each:
            the parameters of the problem that differ there, {} where none does. [{sigma: 0.2}] tells it another noise level,
            [{mask_size: 19}, {}] gives the measuring operator to the last of two data steps only. null gives it to all.
        problems: labels or names of the problems it is used for; null: all it applies to.
        batch_size: how many images it is given at once.
        scales: the scales at which it is used, "small" being the recipe as written; null: all.
    """

    name: str
    label: str | None = None
    flow: str | None = None
    model: str | None = None
    noise: str | Values | None = None
    options: Values = field(default_factory=dict)
    options_for: dict[str, Values] = field(default_factory=dict)
    series: Grid = field(default_factory=dict)
    tune: Grid = field(default_factory=dict)
    operators: list[Values] | None = None
    intervals: str | None = None
    problems: list[str] | None = None
    batch_size: int = 16
    scales: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lists(f"series of {self.name}:", self.series)
        _check_lists(f"tune of {self.name}:", self.tune, equally_long=False)
        twice = sorted(set(self.tune) & (set(self.series) | set(self.options)))
        require(not twice, f"{self.name}: {', '.join(twice)} is to be tuned and is given as well; leave one out")


@dataclass
class ScaleOptions:
    """What another scale of the same recipe replaces.

    Arguments:
        limit: how many images are used.
        source: of the images.
        image_size: of these and of those for tuning.
        flow: in the place of every method's flow.
        noise: in the place of every method's noise flow.
        models: a flow, network or noise flow by the name it has in the recipe -> what is in its place.
        options: name of a method -> options that differ.
    """

    limit: int | None = None
    source: str | list[str] | None = None
    image_size: int | None = None
    flow: str | None = None
    noise: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    options: dict[str, Values] = field(default_factory=dict)


@dataclass
class EvaluationOptions(_Record):
    """An evaluation: what is compared, and how it is run.

    Arguments:
        images: the test images.
        problems: list of measurement problems.
        methods: list of reconstruction methods.
        tune_images: the images that options are tuned on, none of them among the test images.
        scales: name of a scale and what it replaces in the recipe.
        name: of the recipe, for the records.
        out: folder of the results; the same command continues an earlier run in it.
        scale: "smoke" (seconds, on the pictures that ship), "small" (the recipe as written) or one of the recipe's own.
        limit: use only the first so many images.
        seed: of the noise, which is the same for every method.
        device: cpu, cuda or mps.
        devices: how many of them, or processes on the CPU; each takes whole cases of a problem and a method.
        n_pictures: write the pictures of so many images.
    """

    images: ImageOptions
    problems: list[EvaluatedProblem]
    methods: list[EvaluatedMethod]
    tune_images: ImageOptions | None = None
    scales: dict[str, ScaleOptions] = field(default_factory=dict)
    name: str = "evaluation"
    out: str = "runs/evaluation"
    scale: str = "small"
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    devices: int = 1
    n_pictures: int = 4

    def __post_init__(self) -> None:
        require(len(self.problems) > 0, "problems is empty; name at least one, for example denoising")
        require(len(self.methods) > 0, "methods is empty; name at least one, for example tv")
        super().__post_init__()
        single = f"device {self.device!r} is a single one; with devices={self.devices} give its kind only"
        require(self.devices == 1 or ":" not in self.device, single)
        known = {"smoke", "small", *self.scales}
        for one in (*self.problems, *self.methods):
            unknown = ", ".join(sorted({*(one.scales or ())} - known))
            has = f"which the recipe has not; it has {', '.join(sorted(known))}"
            require(not unknown, f"{one.label or one.name} is for the scale {unknown}, {has}")
        tuned = ", ".join(method.label or method.name for method in self.methods if method.tune)
        missing = f"{tuned} is to be tuned: give tune_images, other images than those of the test"
        require(not tuned or self.tune_images is not None, missing)
        if tuned and self.tune_images is not None and self.tune_images.source != SAMPLES:
            same = (self.tune_images.source, self.tune_images.split) == (self.images.source, self.images.split)
            require(not same, "tune_images are the test images; choose the split val or another source")
