"""Print figures of the code's structure: sizes, names, what one PPO step reads, private names of libraries, README.

python tools/figures.py [ROOT]        # ROOT: a checkout, this one if left out
"""

import ast
import inspect
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = {"sft", "reward", "ppo", "eval", "run"}
# What every kind of metric or task must define under this name.
CONTRACT = {"load", "files", "check_reachable", "main", "Config"}
VAGUE = {"found", "said", "paid", "judge", "judged", "place", "part", "parts", "known", "own"}
LONG_LITERAL = 70
# The files of trainers/ppo/ in the order in which CONTRIBUTING.md says to read them.
PPO_STEP = ("trainer", "rollout", "scores", "advantages", "learner", "objective")


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, round(share * len(values) + 0.5) - 1)]


def lines_of(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def sizes(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Files and functions by length."""
    files = {path: lines_of(path) for path in trees}
    functions = [
        node.end_lineno - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    for name, values in (("files", list(files.values())), ("functions", functions)):
        yield (
            f"{name}: {len(values)}; lines: sum {sum(values)}, median {statistics.median(values):.0f}, "
            f"p90 {percentile(values, 0.9)}, max {max(values)}"
        )
    yield f"files above 300 lines: {sum(size > 300 for size in files.values())}"


def loose_files(root: Path) -> Iterator[str]:
    """What stands directly in pipeline/, outside any package."""
    files = {path.stem: lines_of(path) for path in (root / "pipeline").glob("*.py") if path.stem != "__init__"}
    yield f"files directly in pipeline/: {len(files)} with {sum(files.values())} lines"
    yield "  scripts: " + ", ".join(f"{name} {size}" for name, size in sorted(files.items()) if name in SCRIPTS)


def imported_by_trainer(root: Path) -> Iterator[str]:
    """How many modules of the package the module of PPOTrainer imports."""
    trainer = root / "pipeline/trainers/ppo/trainer.py"
    modules = {
        node.module
        for node in ast.walk(ast.parse(trainer.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("pipeline")
    }
    yield f"{trainer.relative_to(root)}: {lines_of(trainer)} lines, imports {len(modules)} modules of the package"


def files_with_word(trees: dict[Path, ast.Module], word: str) -> int:
    """Files that contain a word."""
    return sum(bool(re.search(rf"\b{word}\b", path.read_text(encoding="utf-8"))) for path in trees)


def same_names(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Public classes and functions that share a name, but for those that a contract prescribes."""
    homes = defaultdict(list)
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                homes[node.name].append(path.stem)
    shared = {name: files for name, files in homes.items() if len(files) > 1 and name not in CONTRACT}
    yield f"public classes and functions that share a name: {len(shared)} {', '.join(sorted(shared))}"
    stems = Counter(path.stem for path in trees if path.stem != "__init__")
    twice = sorted(name for name, count in stems.items() if count > 1)
    yield f"file names that occur more than once: {len(twice)} {', '.join(twice)}"


def vague_names(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Assignments to local names that do not say what they hold."""
    counts: Counter[str] = Counter()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
                counts[node.id] += 1
    yield f"assignments to vague names: {counts.total()} {dict(counts.most_common())}"


def private_names(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Private names of transformers' Trainer that the package overrides, calls, reads or writes, and where."""
    from transformers import Trainer

    source = inspect.getsource(Trainer)
    trainer_names = {name for name in re.findall(r"\b_[a-z]\w+", source) if not name.startswith("__")}
    homes = defaultdict(set)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any("Trainer" in ast.unparse(base) for base in node.bases):
                attributes = [n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)]
                attributes += [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
                for name in set(attributes) & trainer_names:
                    homes[name].add(path)
    files = sorted({str(path) for paths in homes.values() for path in paths})
    yield f"private names of transformers.Trainer in use: {len(homes)}, in {len(files)} files"


def readme(root: Path) -> Iterator[str]:
    """Lines of the README, and words per sentence outside code, tables and headings."""
    text = (root / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks = []
    for line in prose.splitlines():
        if re.match(r"\s*(\||#|!\[|<)", line):
            blocks.append("\n\n")
        else:
            blocks.append("\n\n" + line if re.match(r"\s*([-*]|\d+\.) ", line) or not line.strip() else line)
    sentences = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(blocks)):
        paragraph = re.sub(r"^\s*([-*]|\d+\.) ", "", paragraph.strip())
        sentences += re.split(r"(?<=[.!?])\s+(?=[\w`\[(*])", " ".join(paragraph.split()))
    words = [len(sentence.split()) for sentence in sentences if len(sentence.split()) > 1]
    yield (
        f"README: {len(text.splitlines())} lines; words a sentence: median {statistics.median(words):.0f}, "
        f"p90 {percentile(words, 0.9)}"
    )


def long_literals(root: Path) -> Iterator[str]:
    """Whole sentences in assert statements of the tests."""
    files = []
    for path in sorted((root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                for literal in ast.walk(node):
                    if (
                        isinstance(literal, ast.Constant)
                        and isinstance(literal.value, str)
                        and len(literal.value) > LONG_LITERAL
                    ):
                        files.append(path.name)
    yield f"text literals above {LONG_LITERAL} characters in asserts: {len(files)} {dict(Counter(files))}"


def one_ppo_step(root: Path) -> Iterator[str]:
    """Which files of the package run in one PPO step of a tiny model, and how long they are."""
    sys.path.insert(0, str(root))
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from pipeline.rewards import RewardConfig
    from pipeline.trainers.ppo import PPOTrainer

    words = ["<pad>", "<eos>", "<unk>", "red", "blue", "green", "say"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=1, **size)
    )
    config = inspect.signature(PPOTrainer.__init__).parameters["args"].annotation
    dataset = Dataset.from_list([{"prompt": f"say {word}"} for word in ("red", "blue", "green", "red")])
    called: Counter[str] = Counter()

    def note(frame, event, _argument) -> None:
        if event == "call":
            called[frame.f_code.co_filename] += 1

    def length(prompts: list, completions: list, **_columns: list) -> list[float]:
        return [float(len(completion)) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        args = config(
            rewards=(RewardConfig("constant"),),
            total_episodes=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_ppo_epochs=1,
            response_length=4,
            bf16=False,
        )
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = PPOTrainer(model, args, tokenizer, length, dataset, peft_config=lora, output_dir=folder)
        rows = trainer.prompt_rows(0)
        sys.setprofile(note)
        rollout = trainer.collect_rollout(rows)
        experience, _ = trainer.compute_advantages(rollout)
        trainer.update(experience)
        sys.setprofile(None)
    package = root / "pipeline"
    files = sorted({Path(name) for name in called if package in Path(name).parents})
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        package_name = file.relative_to(package).parts[0]
        groups["models/kernels" if "kernels" in file.parts else package_name].append(file)
    for package_name, members in groups.items():
        names = ", ".join(f"{file.relative_to(package)} {lines_of(file)}" for file in members)
        yield f"one PPO step, {package_name}: {len(members)} files, {sum(map(lines_of, members))} lines: {names}"
    yield f"one PPO step, all: {len(files)} files, {sum(map(lines_of, files))} lines"
    core = [package / "trainers" / "ppo" / f"{name}.py" for name in PPO_STEP]
    yield f"one PPO step, to be read: {len(core)} files, {sum(map(lines_of, core))} lines: {', '.join(PPO_STEP)}"


def main(argv: list[str]) -> int:
    """Print every figure."""
    root = Path(argv[0] if argv else Path(__file__).parent.parent).resolve()
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((root / "pipeline").rglob("*.py"))}
    print(*sizes(trees), *loose_files(root), *imported_by_trainer(root), sep="\n")
    for word in ("kl_coef", "PPOConfig"):
        print(f"files with the word {word}: {files_with_word(trees, word)}")
    for figures in (same_names, vague_names, private_names):
        print(*figures(trees), sep="\n")
    print(*readme(root), *long_literals(root), sep="\n")
    print(*one_ppo_step(root), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
