"""Command-line words become configurations: order, nested names, lists, booleans, and one-line errors."""

import subprocess
import sys
from functools import partial

import pytest

from repa.base.errors import UserError
from repa.cli import options
from repa.cli.analyse import CknnaArguments, ProbeArguments
from repa.cli.evaluate import EvaluateArguments
from repa.cli.export import ExportArguments
from repa.cli.main import command_of
from repa.cli.prepare import PrepareArguments
from repa.cli.quickstart import QuickstartArguments
from repa.cli.report import ReportArguments
from repa.cli.sample import SampleArguments
from repa.cli.train import TrainArguments
from repa.recipes import load_recipe
from repa.sampling.config import SampleConfig

parse = partial(options.parse, on_disk=False)


def sample(*argv):
    return parse(SampleArguments, list(argv))


def train(*argv, recipe="quickstart"):
    return parse(TrainArguments, [recipe, "--data", "d", "--out", "o", *argv], load_recipe(recipe))


def prepare(*argv):
    return parse(PrepareArguments, list(argv))


def evaluate(*argv):
    return parse(EvaluateArguments, list(argv))


def cknna(*argv):
    return parse(CknnaArguments, list(argv))


def test_defaults_come_from_the_configuration():
    given = sample("r", "--out", "s.npz")
    assert options.part(SampleConfig, given) == SampleConfig()
    assert (given.run, given.out, given.num_images) == ("r", "s.npz", 64)


def test_a_recipe_gives_the_defaults():
    given = train("--batch-size", "16", "--optimizer.learning-rate", "3e-4")
    recipe = load_recipe("quickstart")
    changed = recipe.override(batch_size=16, optimizer=recipe.optimizer.override(learning_rate=3e-4))
    assert options.part(type(recipe), given) == changed


@pytest.mark.parametrize(
    "argv",
    [
        "r --out s.npz --steps 9 --guidance internal:head=8,scale=1.4 --guidance cfg:scale=2,high=0.7",
        "--out s.npz --guidance internal:head=8,scale=1.4 cfg:scale=2,high=0.7 --steps 9 r",
        "--guidance=internal:head=8,scale=1.4 --steps=9 --out=s.npz --run r --guidance=cfg:scale=2,high=0.7",
        "--guidance=internal:head=8,scale=1.4 --run r --out s.npz --steps 8 --steps 9 --guidance cfg:high=0.7,scale=2",
    ],
)
def test_order_and_spelling_do_not_matter(argv):
    given = sample(*argv.split())
    assert (given.run, given.out, given.steps) == ("r", "s.npz", 9)
    assert given.guidance == ("internal:head=8,scale=1.4", "cfg:scale=2,high=0.7")


def test_values_may_be_negative_empty_or_start_with_a_dash():
    given = sample("r", "--out=--s.npz", "--seed", "-3", "--checkpoint", "-1", "--labels", "3,7")
    assert (given.out, given.seed, given.checkpoint, given.labels) == ("--s.npz", -3, -1, "3,7")
    assert train("--autoencoder", "").autoencoder == ""
    assert train("--optimizer.weight-decay", "1e-2").optimizer.weight_decay == 0.01


def test_list_options_take_all_following_values():
    given = parse(EvaluateArguments, ["s.npz", "--metrics", "fid", "is", "--reference", "d"])
    assert given.metrics == ("fid", "inception_score")
    assert prepare("s", "o", "--resolution", "32", "--features").features == ()
    report = parse(ReportArguments, ["a", "b", "c", "--names", "x", "y", "z"])
    assert (report.runs, report.names) == (("a", "b", "c"), ("x", "y", "z"))


@pytest.mark.parametrize(
    ("argv", "skip", "store"),
    [
        ("s o --resolution 32", False, True),
        ("s o --resolution 32 --skip-bad", True, True),
        ("--skip-bad s o --resolution 32", True, True),
        ("--skip-bad true s --store-images False o --resolution 32", True, False),
        ("--skip-bad=false s o --resolution 32 --store-images=true", False, True),
        ("s o --resolution 32 --skip-bad yes --store-images off", True, False),
    ],
)
def test_booleans_are_parsed(argv, skip, store):
    given = prepare(*argv.split())
    assert (given.source, given.out, given.skip_bad, given.store_images) == ("s", "o", skip, store)


def test_nested_options_keep_the_other_settings():
    before, given = load_recipe("quickstart-repa"), train("--alignments.0.weight", "0.25", recipe="quickstart-repa")
    assert given.alignments == (before.alignments[0].override(weight=0.25),)
    assert given.model == before.model
    given = train("--preview.guidance", "cfg:scale=2", "--model.rotary")
    assert given.preview.guidance == ("cfg:scale=2",)
    assert given.preview.every == load_recipe("quickstart").preview.every
    assert given.model.rotary


def test_alignments_are_appended_and_removed():
    given = train("--alignments.0.target", "tiny", "--alignments.0.depth", "1", recipe="sit-b2")
    (alignment,) = given.alignments
    assert (alignment.target, alignment.depth, alignment.weight) == ("tiny", 1, 0.5)
    given = train(
        *("--alignments.1.target", "tiny", "--alignments.1.depth", "3"),
        *("--alignments.1.loss", "nt_xent:temperature=0.1"),
        recipe="sit-b2-repa",
    )
    assert [a.key for a in given.alignments] == ["dinov2-b@4", "tiny@3"]
    assert given.alignments[1].loss == "nt_xent:temperature=0.1"
    assert train("--alignments", recipe="sit-b2-repa").alignments == ()
    given = train("--alignments", "--alignments.0.target", "tiny", "--alignments.0.depth", "2", recipe="sit-b2-repa")
    assert [a.key for a in given.alignments] == ["tiny@2"]


def test_options_do_not_change_the_recipe_itself():
    before = load_recipe("sit-b2-repa").model_dump()
    train("--alignments.0.weight", "9", "--model.depth", "8", recipe="sit-b2-repa")
    assert load_recipe("sit-b2-repa").model_dump() == before


@pytest.mark.parametrize(
    "argv",
    [
        "quickstart --data d --out o --batch-size 4",
        "--data d --out o --batch-size 4 quickstart",
        "--model.rotary quickstart --data d --out o",
        "--optimizer.beta1 0.5 quickstart --data d --out o",
        "--alignments quickstart --data d --out o --help",
    ],
)
def test_the_recipe_may_stand_anywhere(argv):
    assert options.first(TrainArguments, argv.split(), "recipe") == "quickstart"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("r --out s --stps 3", "has no option --stps.* Did you mean '--steps'"),
        ("r --out s --guidance cfg:scal=3", "'scal'.* channels.*'scale'"),
        ("r --out s --steps.more 3", "--steps has no part 'more'"),
        ("r --out s --guidance 3", "guidance '3'.* autoguidance, cfg, internal, path_drop"),
        ("r --out s --guidance cfg:scale=2,low=0.8,high=0.3", "low <= high"),
        ("r --out s --steps", "--steps needs a value"),
        ("r --out s --steps --seed 1", "--steps needs a value"),
        ("r --out s --steps many", "--steps is 'many', but must be a whole number, such as 8"),
        ("r --out s --steps 2.5", "--steps is '2.5', but must be a whole number"),
        ("r --out s --steps 0", "--steps is '0', but must be at least 1"),
        ("r --out s --sampler heum", "sampler 'heum'.* Did you mean 'heun'"),
        ("r --out s --sampler heun:lats=3", "has no setting 'lats'"),
        ("r more --out s", "got an unexpected word 'more'"),
        ("r --out s -n 3", "'-n' .*two dashes"),
        ("r --out s -- 3", "'--' .*two dashes"),
        ("--out s", r"needs RUN \(run folder\)"),
        ("r", r"needs --out \(Name of an .npz"),
        ("r --out s --bs 3", "Did you mean '--batch-size'"),
        ("r --out s --model.name 3", "has no option --model.name. `repa"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused(argv, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        sample(*argv.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--alignments.2.target tiny", "there are 1 entries, so use number 1 for the next one"),
        ("--alignments.1.target tiny", r"^--alignments\.1\.depth is missing"),
        ("--alignments.x.target tiny", r"--alignments has no part 'x', only numbered ones such as --alignments\.0"),
        ("--alignments.².target tiny", "has no part '²'"),
        ("--alignments.0 tiny", r"--alignments\.0 is a group of options: give --alignments\.0\.target"),
        ("--alignments tiny", "got an unexpected word 'tiny'"),
        ("--alignments.0.tagret tiny", "Did you mean '--alignments.0.target'"),
        ("--encoder-depth 4", r"Did you mean '--model\.depth' or '--alignments\.0\.depth'\?"),
        ("--target tiny", r"Did you mean '--alignments\.0\.target'"),
        ("--learning-rate 1e-3", r"Did you mean '--optimizer\.learning-rate'"),
        ("--optimizer.lr 1e-3", r"Did you mean '--optimizer\.learning-rate'"),
        ("--alignments.0.measure-only maybe", "got an unexpected word 'maybe'"),
        ("--alignments.0.depth 99", "--alignments.0.depth is 99, but SiT-S/4 has 6 blocks: choose 1 to 6"),
        ("--model.depth 1", "--alignments.0.depth is 2, but SiT-S/4 has 1 blocks"),
        ("--alignments.0.loss cosin", "--alignments.0.loss: Unknown loss 'cosin'.* Did you mean 'cosine'"),
        ("--alignments.0.loss nt_xent:temprature=1", "Did you mean 'temperature'"),
        ("--model SiT-B/2", r"--model is a group of options: give --model\.name"),
        ("--model.name SiT-Q/2", "Unknown model 'SiT-Q/2'"),
        ("--diffusion.path straight", "path 'straight'"),
        ("--optimizer.learning-rate nan", "--optimizer.learning-rate is 'nan'"),
        ("--label-dropout 1.5", "at most 1"),
        ("--preview.guidance cfg:scale=2 3", r"^--preview\.guidance: Unknown guidance '3'"),
        ("--ema-decays 0.9 2", r"^--ema-decays is '2'"),
        ("--batch-size 3 --accumulate 2", r"a multiple of it\.$"),
    ],
)
def test_invalid_settings_in_a_recipe_are_refused(argv, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        train(*argv.split())
    assert "\n" not in str(error.value)


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        train("--help", recipe="quickstart-repa")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--batch-size" in text
    assert "(default: 32)" in text
    assert "--optimizer.learning-rate" in text
    assert "--alignments.0.loss" in text


@pytest.mark.parametrize("recipe", [None, "sit-b2"])
def test_help_without_alignments_shows_the_options_of_a_first_one(recipe, capsys):
    with pytest.raises(SystemExit):
        parse(TrainArguments, ["--help"], load_recipe(recipe) if recipe else None)
    text = " ".join(capsys.readouterr().out.split())
    assert "--alignments.0.target" in text
    assert "--alignments.0.time-weight" in text
    assert "--streams.0.source" in text


@pytest.mark.parametrize(
    ("cls", "line"),
    [
        (ExportArguments, "usage: repa export RUN OUT [--OPTION VALUE ...]"),
        (TrainArguments, "usage: repa train RECIPE --data DATA --out OUT [--OPTION VALUE ...]"),
        (QuickstartArguments, "usage: repa quickstart [SOURCE] [--OPTION VALUE ...]"),
        (PrepareArguments, "usage: repa prepare SOURCE [OUT] [--OPTION VALUE ...]"),
        (CknnaArguments, "usage: repa analyse cknna RUNS... --data DATA [--OPTION VALUE ...]"),
    ],
)
def test_usage_lists_each_word_once(cls, line, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help"])
    first, empty, description, *_ = capsys.readouterr().out.splitlines()
    assert (first, empty) == (line, "")
    assert description.split()[:3] == str(cls.__doc__).split()[:3]


def test_a_missing_required_field_is_named():
    class Arguments(options.Command):
        verb = "x"
        long_name: int
        """A number."""

    with pytest.raises(UserError, match=r"`repa x` needs --long-name \(A number\): see `repa x --help`"):
        parse(Arguments, [])


# Importing and checking configurations, which every command does before it imports torch.
TORCH_FREE = """
import sys
from importlib import import_module

for package in ("diffusion", "models", "alignment", "data", "sampling", "training", "evaluation", "analysis"):
    import_module(f"repa.{package}.config")
import repa.cli.console, repa.cli.options, repa.encoders, repa.recipes
from repa.alignment import AlignmentConfig
from repa.autoencoders import AUTOENCODERS
from repa.base.errors import UserError
from repa.diffusion import SAMPLERS
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig

ModelConfig()
DiffusionConfig(path="vp:beta_max=3.0")
AlignmentConfig(target="tiny", depth=1, loss="nt_xent", projector="conv:kernel=3", token_norm="zscore")
try:
    AlignmentConfig.parse({"target": "tiny", "depth": 1, "projector": "cnov"})
except UserError:
    pass
SAMPLERS.check("ddim:eta=1")
AUTOENCODERS.check("kl")
repa.encoders.ENCODERS.check("tiny"), repa.encoders.load_encoder
print([name for name in ("torch", "diffusers") if name in sys.modules])
"""


def test_no_configuration_imports_torch():
    done = subprocess.run([sys.executable, "-c", TORCH_FREE], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_a_recipe_may_be_given_by_its_flag_but_only_once():
    assert options.first(TrainArguments, ["--recipe", "quickstart"], "recipe") == "quickstart"
    with pytest.raises(UserError, match="got an unexpected word 'sit-b2'"):
        parse(TrainArguments, ["sit-b2", "--recipe", "quickstart", "--data", "d", "--out", "o"])


@pytest.mark.parametrize(
    ("parse", "words", "sentence"),
    [
        (sample, ("r", "--out", "s", "--weak", "w"), "--weak has no effect without --guidance autoguidance"),
        (sample, ("r", "--out", "s", "--weak-checkpoint", "3"), "--weak-checkpoint has no effect"),
        (sample, ("r", "--out", "s", "--guide-image", "i.png"), "without --guidance representation"),
        (sample, ("r", "--out", "s", "--decoder-weights", "w"), "without --decoder"),
        (sample, ("r", "--out", "s", "--checkpoint", "-7"), "at least -1"),
        (prepare, ("s", "d", "--resolution", "8", "--text-form", "int8"), "--text-form has no effect without --text"),
        (prepare, ("s", "d", "--resolution", "8", "--grid", "4"), "--grid has no effect without --features"),
        (
            prepare,
            ("s", "d", "--resolution", "8", "--features", "tiny", "--feature-forms", "pca4", "int8"),
            "'pca4' and 'int8' are both for all encoders",
        ),
        (
            evaluate,
            ("s.npz", "--reference", "r", "--prompts", "p.txt"),
            "--prompts has no effect without one of the metrics",
        ),
        (evaluate, ("s.npz", "--reference", "r", "--clip-weights", "w"), "--clip-weights has no effect"),
        (train, ("--text-weights", "w"), "reads no text"),
        (train, ("--preview.num-scored", "1"), "needs at least two samples"),
        (
            cknna,
            ("r", "--data", "d", "--measure", "cka", "--variant", "platonic"),
            "--variant has no effect without --measure cknna",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(parse, words, sentence):
    with pytest.raises(UserError, match=sentence):
        parse(*words)


IDLE = [
    # start of the command, an option that it ignores, the reason
    ("bench r --data d", "--token-width 8", "with --data"),
    ("check d", "--feature-weights tiny=w", "without --full"),
    ("check d", "--num-images 64", "without --full"),
    ("analyse encoders d --encoders tiny", "--neighbours 3", "with a single encoder"),
    ("evaluate s.npz --reference r --metrics fid", "--clip clip-b", "without one of the metrics clip_score"),
    ("evaluate s.npz --reference r --metrics fid", "--clip clip-l", "without one of the metrics clip_score"),
    ("evaluate s.npz --reference r --metrics fid", "--neighbours float16", "without one of the metrics precision"),
    ("evaluate s.npz --reference r", "--sampler heun", "here: s.npz is not a run folder"),
    ("evaluate s.npz --reference r", "--weights ema", "here: s.npz is not a run folder"),
    ("analyse pictures r --data d --images 1 2", "--num-images 2", "with --images"),
    ("analyse pictures r --data d --encoders", "--encoder-weights tiny=w", "without --encoders"),
    ("prepare d --remove images", "--resolution 16", "with --remove"),
    ("prepare d --only text --text tiny-text", "--resolution 16", "without a source"),
    ("prepare d --only features:tiny", "--flip", "without a source"),
    ("prepare d --only features:tiny", "--skip-bad", "without a source"),
    ("analyse probe tiny --data d", "--depths 1", "without a run folder"),
    ("analyse probe tiny --data d", "--times 0.5", "without a run folder"),
    ("analyse probe tiny --data d", "--weights model", "without a run folder"),
    ("analyse probe tiny --data d", "--checkpoints 5", "without a run folder"),
    ("train", "--head-weight 0.1", "without --model.heads"),
    ("train", "--compile-scope step", "without --compile"),
    ("train", "--parallel ddp", "with one process"),
    ("train", "--model.text-shape 4 8", "without a backbone that reads text"),
    ("estimate sit-b2", "--parallel fsdp", "with one device"),
    ("prepare s d --resolution 16", "--precision bf16", "without --autoencoder"),
    ("train", "--model.separate-times", "without --diffusion.token-times"),
    ("train", "--model.keep-groups 0", "without --model.route"),
    ("train", "--diffusion.sigma-min 0.1", "without --diffusion.prediction data"),
    ("train --preview.every 0 --preview.num-scored 0", "--preview.sampler heun", "without --preview.every"),
    ("train --preview.every 0 --preview.score-every 5", "--preview.num-images 4", "without --preview.every"),
    ("train --preview.num-scored 0", "--preview.features tiny", "without --preview.num-scored"),
    ("train", "--preview.decoder-weights w", "without --preview.decoder"),
    ("train --alignments.1.target tiny --alignments.1.depth 3 --alignments.1.projector-of tiny@2", "--alignments.1.projector linear",
     "with --alignments.1.projector-of"),
]  # fmt: skip


@pytest.mark.parametrize(("begin", "option", "why"), IDLE)
def test_an_option_that_nothing_reads_is_refused(begin, option, why):
    verb, *words = begin.split()

    def parsed(*more):
        if verb == "train":
            return train(*words, *more, recipe="quickstart-repa")
        return parse(*command_of(verb, [*words, *more]))

    parsed()
    with pytest.raises(UserError) as refused:
        parsed(*option.split())
    assert str(refused.value).startswith(f"{option.split()[0]} has no effect {why}")
    assert str(refused.value).endswith(": leave it out.")


def test_the_setting_that_enables_an_option_may_stand_anywhere():
    assert train("--compile-scope", "step", "--compile").compile_scope == "step"
    assert train("--head-weight", "0.1", "--model.heads", "2").head_weight == 0.1
    probe = parse(ProbeArguments, ["tiny", "--data", "d", "--epochs", "3", "--encoder-weights", "tiny=w"])
    assert probe.encoders == ["tiny"]


def test_a_recipe_may_contain_settings_that_the_command_disables():
    assert train("--preview.every", "0", "--preview.num-scored", "0").preview.features == "tiny-classifier"
