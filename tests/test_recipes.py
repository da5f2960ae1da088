"""Recipes: what a YAML and a command line may say."""

import re
from pathlib import Path

import pytest

from modeling_speculator.trainers import parse_recipe


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/stage*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"base_model: base\noutput_dir: {tmp_path}\nuse_cpu: true\n{text}\n")
        return ["--config", str(path)]

    return write


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_recipes_are_valid(path):
    model, data, training = parse_recipe(["--config", str(path)])
    assert training.stage == int(path.stem[-1])
    assert [data.dataset, data.data_files, data.prompts].count(None) == 2
    if training.stage == 1:
        assert len(model.top_k_tokens_per_head) == model.n_predict
    else:
        assert model.speculator == parse_recipe(["--config", str(path.with_stem("stage1"))])[2].output_dir


LAYERS = {"llama2-13b": 40, "codellama-13b": 40, "granite-20b": 52, "smollm2-135m": 30, "qwen3-8b": 36}
LAYERS |= {"granite-4.0-micro": 40, "mistral-small-24b": 40, "gemma-3-12b": 48, "gpt-oss-20b": 24}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/context.yaml")), ids=lambda path: path.parent.name)
def test_recipes_of_context_speculators(path):
    """Of features that EAGLE-3 takes; in one stage."""
    layers = LAYERS.get(path.parent.name, 32)
    model, data, training = parse_recipe(["--config", str(path)])
    assert (model.method, training.stage, model.speculator) == ("context", 2, None)
    assert model.feature_layers == [2, layers // 2, layers - 3]
    assert training.head_weights == [round(0.8**head, 3) for head in range(model.n_predict)]
    assert [data.dataset, data.data_files, data.prompts].count(None) == 2 and not training.shard_base_model


PUBLISHED = {  # heads, width, top-k; and the two-stage recipe
    "llama2-7b": (3, 4096, [5, 3, 2]),
    "llama2-13b": (3, 4096, [5, 3, 2]),
    "codellama-13b": (7, 4096, [4, 3, 2, 2, 2, 2, 2]),
    "granite-20b": (5, 4096, [5, 3, 2, 2, 2]),
    "llama3.1-8b": (4, 3072, [4, 3, 2, 2]),
}


@pytest.mark.parametrize("target", PUBLISHED)
def test_targets_have_the_published_recipe(target):
    n_predict, inner_dim, top_k = PUBLISHED[target]
    model, data, training = parse_recipe(["--config", str(ROOT / f"recipes/{target}/stage1.yaml")])
    assert (model.n_predict, model.inner_dim, model.top_k_tokens_per_head) == (n_predict, inner_dim, top_k)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8
    assert (data.sequence_length, data.streaming) == (4096, True)
    _, data2, training2 = parse_recipe(["--config", str(ROOT / f"recipes/{target}/stage2.yaml")])
    assert training2.per_device_train_batch_size * training2.gradient_accumulation_steps == 96
    assert (data2.prompt_length, data2.generation_length) == (64, 256)
    assert (training2.generation_temperature, training2.generation_top_k) == (1.0, 10)
    for args, steps, peak, warmup in ((training, 15_000, 1e-3, 750), (training2, 6_000, 1e-4, 300)):
        assert (args.max_steps, args.learning_rate, args.warmup_steps) == (steps, peak, warmup)
        assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
        assert args.bf16 and args.parabolic_schedule and args.loss == ["cross_entropy"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_configs_are_known_to_accelerate(path):
    from accelerate.commands.config.config_args import ClusterConfig

    ClusterConfig.from_yaml_file(str(path))  # raises for keys that it does not know


FROM_ELSEWHERE = {  # what commands write that no recipe trains: measurements, sweeps, what is trained in passing
    *(
        "acceptance",
        "latency",
        "tuning",
        "quality.json",
        "sweeps",
        "head_to_head",
        "arctic",
        "converted",
        "comparison",
    ),
    *("field", "streams", "mine", "my-adapter", "gpu", "stories", "stories260K", "quickstart", "smollm2-135m"),
}


def test_documented_folders_are_those_that_the_recipes_write():
    written = {Path(parse_recipe(["--config", str(path)])[2].output_dir) for path in RECIPES}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("**/*.md")]
    pages += [*(ROOT / "recipes").glob("**/*.py"), *(ROOT / "model_cards").iterdir(), ROOT / "Makefile"]
    named = {
        Path(name.rstrip(".,:"))
        for page in pages
        if page.is_file()
        for name in re.findall(r"\boutputs/[\w./-]+", page.read_text())
    }
    others = {name for name in named if name.parts[1] not in FROM_ELSEWHERE}
    assert Path("outputs/llama2-7b/speculator") in others
    assert others <= written


def test_there_is_a_config_for_each_way_to_distribute():
    names = {path.stem for path in (ROOT / "recipes/accelerate_configs").glob("*.yaml")}
    assert names == {"single", "multi_gpu", "fsdp2", "zero2", "zero3"}


def test_types_are_those_of_the_fields(recipe):
    model, data, training = parse_recipe(
        recipe("learning_rate: 1e-3\ntop_k_tokens_per_head: [5, 3, 2]\nspeculator: null\ndata_files: [a.txt, b.txt]")
    )
    assert training.learning_rate == 1e-3
    assert model.top_k_tokens_per_head == [5, 3, 2]
    assert model.speculator is None
    assert data.data_files == ["a.txt", "b.txt"]


def test_every_kind_of_value(recipe):
    text = 'lr_scheduler_kwargs: {"min_lr": 1e-5}\nparabolic_schedule: false\nrun_name: -5\nspeculator: here'
    model, _, training = parse_recipe(recipe(text) + ["--speculator", "null"])
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert training.run_name == "-5"
    assert model.speculator is None
    assert parse_recipe([f"--config={recipe('n_predict: 4')[1]}"])[0].n_predict == 4


def test_a_flag_wins_over_the_file(recipe):
    args = recipe("max_steps: 5\nn_predict: 3") + ["--max_steps", "7", "--n_predict=4"]
    model, _, training = parse_recipe(args)
    assert (training.max_steps, model.n_predict) == (7, 4)


@pytest.mark.parametrize(
    ("text", "flags", "complaint"),
    [
        ("learnig_rate: 1e-3", [], "Unknown key 'learnig_rate' in .*Did you mean 'learning_rate'"),
        ("", ["--learnig_rate", "1"], "Unknown key 'learnig_rate' in the command line"),
        ("", ["--learning_r", "1"], "Unknown key"),
        ("", ["--max_steps=5", "stray"], "without a key.*stray"),
        ("max_steps: many", [], "max_steps.*invalid int"),
        ("max_steps: 1\nmax_steps: 2", [], "twice.*max_steps"),
        ("", ["--config"], "needs the path"),
        ("text_column: {a: b}", [], "`text_column` takes one value"),
        ("report_to: [wandb, tensorboard]", [], "`report_to` takes one value"),
        ("top_k_tokens_per_head: [[5, 3]]", [], "`top_k_tokens_per_head` takes a flat list"),
        ("stage: 4", [], "`stage` must be 1"),
        ("base_model_quantization: 3bit", [], "`base_model_quantization` must be"),
        ("loss: [cross_entropy, accuracy]", [], "`loss` must name one or more of cross_entropy, argmax, forward_kl"),
        ("loss: [cross_entropy, forward_kl]\nloss_weights: [1.0]", [], "`loss_weights` needs 2 numbers"),
        ("loss: [forward_kl]\ntarget_top_k: 0", [], "`target_top_k` must be between 1"),
        ("target_temperature: 0.25", [], "are for the losses forward_kl, .*but `loss` is"),
        ("unrolled_share: 1.5", [], "`unrolled_share` must be between 0 and 1"),
        ("generation_top_k: 0", [], "`generation_top_k` must be between 1 and"),
        ("generation_cache: paged", [], "`generation_cache` must be"),
    ],
)
def test_a_typo_stops_the_run(recipe, text, flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_recipe((recipe(text) if "--config" not in flags else []) + flags)


def test_every_spelling_of_a_flag(recipe):
    args = recipe("save_strategy: no\neval_strategy: steps\nseparate_documents: true")
    _, data, training = parse_recipe(
        args + ["--no_separate_documents", "--eval-strategy", "no", "--no-parabolic-schedule"]
    )
    assert not data.separate_documents
    assert not training.parabolic_schedule
    assert training.save_strategy == training.eval_strategy == "no"


def test_a_recipe_that_does_not_exist():
    with pytest.raises(ValueError, match="nowhere.yaml`: there is no such file"):
        parse_recipe(["--config", "nowhere.yaml"])
