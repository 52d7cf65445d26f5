"""`uldm ldm explain`: where a model looks while it samples."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from uldm_cli.cli.options import (
    Arguments,
    BatchSize,
    Command,
    Deterministic,
    Device,
    DryRun,
    Eta,
    Json,
    Model,
    Num,
    Outdir,
    Precision,
    Quiet,
    Resume,
    Sampler,
    Seed,
    ShowInline,
    StepSize,
    TotalSteps,
    Weights,
)
from uldm_cli.cli.sampling import (
    Compile,
    Height,
    Rng,
    Seeds,
    SheetDpi,
    SheetFontSize,
    SheetFormat,
    Show,
    Spacing,
    Width,
    sampling_flags,
    sheet_flags,
    show_plan,
    show_result,
)

_SALIENCY, _ATTENTION, _DRAWING = "Saliency", "Attention", "Drawing"
_LOOKING = (
    *("saliency.target", "saliency.box", "saliency.method"),
    *("attention.query", "attention.resolution", "attention.layer", "attention.head", "attention.rollout"),
)
"""Fields of the config whose flags are named alike: `--saliency-target`."""

Save = Annotated[
    str | None,
    typer.Option(
        "--save",
        metavar="LIST",
        help="Of image,saliency,attention (default: all three).",
        rich_help_panel="Output",
    ),
]
Separate = Annotated[
    bool, typer.Option("--separate", metavar="", help="Also a file a step and sample.", rich_help_panel="Output")
]
SaveArrays = Annotated[
    bool,
    typer.Option(
        "--save-arrays", metavar="", help="Also the maps as numbers, in .safetensors.", rich_help_panel="Output"
    ),
]
SaliencyTarget = Annotated[
    str | None,
    typer.Option(
        "--saliency-target",
        metavar="x0|eps|box",
        help="What it is for: the predicted image, noise, or a part of the image (default: x0).",
        rich_help_panel=_SALIENCY,
    ),
]
SaliencyBox = Annotated[
    str | None,
    typer.Option(
        "--saliency-box",
        metavar="X,Y,W,H",
        help="That part: left, top, width, height in pixels.",
        rich_help_panel=_SALIENCY,
    ),
]
SaliencyMethod = Annotated[
    str | None,
    typer.Option(
        "--saliency-method",
        metavar="NAME",
        help="gradient, smoothgrad or integrated (default: gradient).",
        rich_help_panel=_SALIENCY,
    ),
]
AttentionQuery = Annotated[
    str | None,
    typer.Option(
        "--attention-query",
        metavar="X,Y",
        help="Where this pixel looks (default: what each receives from all).",
        rich_help_panel=_ATTENTION,
    ),
]
AttentionResolution = Annotated[
    str | None,
    typer.Option(
        "--attention-resolution",
        metavar="N",
        help="Only layers whose maps are N positions high (default: all).",
        rich_help_panel=_ATTENTION,
    ),
]
AttentionLayer = Annotated[
    str | None,
    typer.Option("--attention-layer", metavar="NAME", help="Only this layer.", rich_help_panel=_ATTENTION),
]
AttentionHead = Annotated[
    int | None,
    typer.Option("--attention-head", metavar="N", help="Only this head, from 0.", rich_help_panel=_ATTENTION),
]
AttentionRollout = Annotated[
    bool,
    typer.Option(
        "--attention-rollout",
        metavar="",
        help="Follow it through the layers, instead of their mean.",
        rich_help_panel=_ATTENTION,
    ),
]
OverlayMode = Annotated[
    str | None,
    typer.Option(
        "--overlay",
        metavar="blend|color|none",
        help="Colours over the image, colours alone, or grey alone (default: blend).",
        rich_help_panel=_DRAWING,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        metavar="X",
        help="How much of the map is in the blend, 0 to 1 (default: 0.5).",
        rich_help_panel=_DRAWING,
    ),
]
Colormap = Annotated[
    str | None,
    typer.Option(
        "--colormap",
        metavar="NAME",
        help="inferno, magma, plasma, viridis, cividis or gray (default: inferno).",
        rich_help_panel=_DRAWING,
    ),
]
ScalePer = Annotated[
    str | None,
    typer.Option(
        "--scale-per",
        metavar="row|step",
        help="A scale for all steps of a sample, or for each step (default: row; saliency: step).",
        rich_help_panel=_DRAWING,
    ),
]

EXAMPLES = """
Examples:
  uldm ldm explain                                        image, saliency and attention, a column a step
  uldm ldm explain --show x0 --scale-per row              over the predicted image; one scale for all steps
  uldm ldm explain --save saliency --saliency-box 16,16,24,24 --saliency-method smoothgrad
  uldm ldm explain --save attention --attention-query 32,20 --attention-resolution 16
  uldm ldm explain --format pdf --font-size 9             for print
"""


def add_to(app: typer.Typer) -> None:
    """Add `explain` to the group."""
    about = "Sample images, and draw where the model looks at chosen steps: saliency and attention."
    app.command(cls=Command, help=about, epilog=EXAMPLES)(explain)


def explain(
    arguments: Arguments = None,
    model: Model = None,
    weights: Weights = None,
    sampler: Sampler = None,
    total_steps: TotalSteps = None,
    step_size: StepSize = None,
    eta: Eta = None,
    spacing: Spacing = None,
    height: Height = None,
    width: Width = None,
    num: Num = None,
    seed: Seed = None,
    seeds: Seeds = None,
    rng: Rng = None,
    deterministic: Deterministic = False,
    saliency_target: SaliencyTarget = None,
    saliency_box: SaliencyBox = None,
    saliency_method: SaliencyMethod = None,
    attention_query: AttentionQuery = None,
    attention_resolution: AttentionResolution = None,
    attention_layer: AttentionLayer = None,
    attention_head: AttentionHead = None,
    attention_rollout: AttentionRollout = False,
    overlay: OverlayMode = None,
    alpha: Alpha = None,
    colormap: Colormap = None,
    scale_per: ScalePer = None,
    show: Show = None,
    save: Save = None,
    separate: Separate = False,
    save_arrays: SaveArrays = False,
    format: SheetFormat = None,
    dpi: SheetDpi = None,
    font_size: SheetFontSize = None,
    outdir: Outdir = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    batch_size: BatchSize = None,
    device: Device = None,
    precision: Precision = None,
    compile: Compile = False,
) -> None:
    arguments, flags = sampling_flags(given := locals())
    from uldm_cli.runs.explain import explain as run
    from uldm_cli.runs.explain_plan import plan_explain
    from uldm_cli.runs.plan import read_config
    from uldm_cli.specs.explaining import Explaining
    from uldm_cli.specs.load import split_arguments

    flags |= sheet_flags(format, dpi, font_size) | _looking_flags(given)
    config, overrides = split_arguments(arguments)
    plan = plan_explain(read_config(Explaining, config, overrides, flags), outdir, config)
    if dry_run:
        show_plan("explain", plan, list(plan.explain_files()))
    else:
        show_result("explain", run(plan, resume=resume), inline=show_inline)


def _looking_flags(parameters: Mapping[str, Any]) -> dict[str, object]:
    """The flags that say where to look and how to draw it, as named overrides of the config."""
    from uldm_cli.specs.load import Flag

    # A flag that was not given is False where it takes no value: the config decides.
    given = {name: None if value is False else value for name, value in parameters.items()}
    flags: dict[str, object] = {
        path: Flag(f"--{path.replace('.', '-')}", given[path.replace(".", "_")]) for path in _LOOKING
    }
    flags |= {f"overlay.{name}": given[name] for name in ("alpha", "colormap", "scale_per")}
    flags |= {name: given[name] for name in ("separate", "save_arrays")}
    return flags | {"overlay.mode": Flag("--overlay", given["overlay"])}
