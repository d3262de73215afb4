"""The quickstart's stages in order: what each one types, reads and leaves. `quickstart_runner` runs them.

Paths below the run directory follow the real runs: raw/ -> jsonl/ -> tokens/ -> fim/ -> data/ -> phase1..3/ -> hf/ ->
megatron_tp2_pp2/ -> tuned/ -> hf_chat/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import yaml

from tools.quickstart_runner import ROOT, Command, Stage

PARAMS = Path("params/tiny")
PHASES = (1, 2, 3)
TENSOR_PARALLEL = PIPELINE_PARALLEL = 2
SAMPLED = ("--temperature", 0.5, "--seed", 1)  # the likeliest tokens of a small model go round in circles
SPEAKING_PROMPT = "def main(args=None):\n"
INFILL_PREFIX, INFILL_SUFFIX = "def read(path):\n    with open(path) as ", ":\n        return file.read()\n"
QUESTION = "Write the Python function `is_empty(self)`. Return True if the queue is empty, False otherwise."


@dataclass(frozen=True)
class Scale:
    """How much of everything a run does. `pretrain_steps` None means as many as the params files say."""

    max_files: int | None
    pieces: int
    pretrain_steps: int | None
    batch_size: int | None
    tuning_steps: int
    tuning_batch_size: int
    new_tokens: int


FULL = Scale(
    max_files=None,
    pieces=4096,
    pretrain_steps=None,
    batch_size=None,
    tuning_steps=100,
    tuning_batch_size=16,
    new_tokens=60,
)
MINIATURE = Scale(
    max_files=24, pieces=512, pretrain_steps=4, batch_size=2, tuning_steps=3, tuning_batch_size=2, new_tokens=8
)


@dataclass(frozen=True)
class Chain:
    """The stages of one run below `run`, at one scale."""

    run: Path
    scale: Scale

    def corpus(self) -> Stage:
        """Python's own library as parquet (code), jsonl (prose) and instruction pairs."""
        limit = () if self.scale.max_files is None else ("--max-files", self.scale.max_files)
        return Stage(
            "corpus",
            (_command("python", "-m", "tools.quickstart_corpus", self.run / "raw", *limit),),
            outputs=(self.run / "raw",),
        )

    def tokenizer(self) -> Stage:
        """A SentencePiece model trained on the corpus, and CrystalCoder's tokenizer made from it."""
        model = self.run / "sentencepiece.model"
        return Stage(
            "tokenizer",
            (
                _command(
                    *("python", "-m", "tools.quickstart_tokenizer", self.run / "raw", model),
                    *("--vocab-size", self.scale.pieces),
                ),
                _command("python", "-m", "CrystalCoder.build_tokenizer", model, self._tokenizer),
            ),
            outputs=(model, self._tokenizer),
        )

    def jsonl(self) -> Stage:
        """Parquet to JSON lines."""
        out = self.run / "jsonl"
        return Stage(
            "parquet to jsonl",
            (_command("crystalcoder", "data", "parquet2jsonl", self.run / "raw/starcoderdata", "--out", out),),
            outputs=(out,),
        )

    def tokens(self) -> Stage:
        """Text to packed sequences: code, prose, and some of both held out."""
        sources = {
            self.run / "jsonl/python": self.run / "tokens/code",
            self.run / "raw/slimpajama": self.run / "tokens/prose",
            self.run / "raw/validation": self.run / "data/val",
        }
        return Stage(
            "tokenise",
            tuple(
                _command(
                    *("crystalcoder", "data", "tokenize", source, "--out", out, "--tokenizer", self._tokenizer),
                    *("--max-seq-length", self._seq_length),
                )
                for source, out in sources.items()
            ),
            outputs=tuple(sources.values()),
            sequences=self.run / "tokens",
        )

    def fim(self) -> Stage:
        """Fill in the middle: 90 % for phase 2, 30 % for phase 3."""
        return Stage(
            "fill in the middle",
            tuple(
                _command(
                    *("crystalcoder", "data", "fim", self.run / "tokens/code", "--out", self.run / f"fim/{rate}"),
                    *("--tokenizer", self._tokenizer, "--rate", rate, "--spm-rate", 0.5, "--seed", seed),
                )
                for seed, rate in enumerate((0.9, 0.3), start=2)
            ),
            outputs=(self.run / "fim",),
            sequences=self.run / "fim",
        )

    def shuffle(self) -> Stage:
        """One random order for each set that the phases read."""
        sets = {
            "prose": self.run / "tokens/prose",
            "code": self.run / "tokens/code",
            "code_fim": self.run / "fim/0.9",
            "code_fim_0.3": self.run / "fim/0.3",
        }
        return Stage(
            "shuffle",
            tuple(
                _command("crystalcoder", "data", "shuffle", source, "--out", self.run / "data" / name, "--files", 2)
                for name, source in sets.items()
            ),
            outputs=tuple(self.run / "data" / name for name in sets),
            sequences=self.run / "data",
        )

    def phase(self, number: int) -> Stage:
        """One pretraining phase, from the weights of the one before."""
        out = self.run / f"phase{number}"
        start = ("--checkpoint-path", self.run / f"phase{number - 1}") if number > 1 else ()
        params = PARAMS / f"phase{number}.yaml"
        return Stage(
            f"phase {number}",
            (
                _command(
                    *("crystalcoder", "pretrain", "--params", params, "--data-root", self.run, "--model-dir", out),
                    *(*start, *self._overrides()),
                ),
            ),
            outputs=(out,),
            inputs=(ROOT / params,),
            metrics=out / "metrics.jsonl",
            iterations=self.scale.pretrain_steps or _params(number)["runconfig"]["max_steps"],
        )

    def export(self) -> Stage:
        """Megatron to Hugging Face, the tokenizer beside the weights."""
        out = self.run / "hf"
        return Stage(
            "to Hugging Face",
            (
                _command("crystalcoder", "convert", "--from", self.run / "phase3", "--to", out, "--format", "hf"),
                _command("python", "-m", "CrystalCoder.build_tokenizer", self._tokenizer, out),
            ),
            outputs=(out,),
        )

    def megatron(self) -> Stage:
        """Hugging Face to Megatron, laid out over four ranks."""
        out = self.run / "megatron_tp2_pp2"
        return Stage(
            "to Megatron TP2 PP2",
            (
                _command(
                    *("python", "Megatron-LM/tools/checkpoint/util.py", "--model-type", "GPT"),
                    *("--loader", "crystalcoder_hf", "--saver", "megatron"),
                    *("--target-tensor-parallel-size", TENSOR_PARALLEL),
                    *("--target-pipeline-parallel-size", PIPELINE_PARALLEL),
                    *("--load-dir", self.run / "hf", "--save-dir", out),
                ),
            ),
            outputs=(out,),
        )

    def conversations(self) -> Stage:
        """Instruction pairs to masked rows."""
        out = self.run / "chat"
        return Stage(
            "instruction rows",
            (
                _command(
                    *("crystalcoder", "finetune", "prepare", self.run / "raw/instructions.jsonl", "--out", out),
                    *("--tokenizer", self._tokenizer, "--max-seq-length", self._seq_length),
                ),
            ),
            outputs=(out,),
            sequences=out,
        )

    def tuning(self) -> Stage:
        """Instruction tuning on four ranks."""
        out = self.run / "tuned"
        environment = {
            "DATA_PATH": self.run / "chat",
            "LOAD": self.run / "megatron_tp2_pp2",
            "SAVE": out,
            "ITERS": self.scale.tuning_steps,
            "GLOBAL_BATCH_SIZE": self.scale.tuning_batch_size,
            "SEQ_LENGTH": self._seq_length,
            "EXTRA_ARGS": "--loss-reduction token --lr 2e-3 --min-lr 2e-4",  # a small model wants a higher rate
        }
        micro_batch_size = min(8, self.scale.tuning_batch_size)
        return Stage(
            "instruction tuning",
            (
                _command(
                    *("bash", "rank_cmd_phase2.sh", 0, 1, "localhost", self._port, TENSOR_PARALLEL, PIPELINE_PARALLEL),
                    *(micro_batch_size, self.run / "tuned_logs"),
                    environment={name: str(value) for name, value in environment.items()},
                ),
            ),
            outputs=(out,),
            metrics=out / "metrics.jsonl",
            iterations=self.scale.tuning_steps,
        )

    def export_tuned(self) -> Stage:
        """Back to Hugging Face."""
        out = self.run / "hf_chat"
        return Stage(
            "back to Hugging Face",
            (
                _command(
                    *("python", "Megatron-LM/tools/checkpoint/util.py", "--model-type", "GPT"),
                    *("--loader", "megatron", "--saver", "crystalcoder_hf"),
                    *("--load-dir", self.run / "tuned", "--save-dir", out, "--hf-config-path", self.run / "hf"),
                ),
            ),
            outputs=(out,),
        )

    def answers(self) -> Stage:
        """A completion, an infill and a chat answer."""
        limit = ("--max-new-tokens", self.scale.new_tokens)
        return Stage(
            "answers",
            (
                _command("crystalcoder", "generate", self.run / "hf", "--prompt", SPEAKING_PROMPT, *limit, *SAMPLED),
                _command(
                    *("crystalcoder", "generate", self.run / "hf"),
                    *("--prefix", INFILL_PREFIX, "--suffix", INFILL_SUFFIX, *limit),
                ),
                _command("crystalcoder", "chat", self.run / "hf_chat", "--message", QUESTION, *limit),
            ),
            outputs=(),
        )

    @property
    def _tokenizer(self) -> Path:
        return self.run / "tokenizer"

    @property
    def _seq_length(self) -> int:
        length: int = _params(1)["model"]["max_position_embeddings"]
        return length

    @property
    def _port(self) -> int:
        """Where the ranks meet: the same in every run of this directory, another for a run in another."""
        return 20_000 + crc32(str(self.run).encode()) % 10_000

    def _overrides(self) -> tuple[str, ...]:
        """What a smaller scale changes in the params files."""
        if self.scale.pretrain_steps is None:
            return ()
        values = {
            "runconfig.max_steps": self.scale.pretrain_steps,
            "runconfig.checkpoint_steps": self.scale.pretrain_steps,
            "train_input.batch_size": self.scale.batch_size,
        }
        return tuple(f"{key}={value}" for key, value in values.items())


def stages(run: Path, scale: Scale) -> list[Stage]:
    """The whole chain."""
    chain = Chain(run, scale)
    return [
        chain.corpus(),
        chain.tokenizer(),
        chain.jsonl(),
        chain.tokens(),
        chain.fim(),
        chain.shuffle(),
        *map(chain.phase, PHASES),
        chain.export(),
        chain.megatron(),
        chain.conversations(),
        chain.tuning(),
        chain.export_tuned(),
        chain.answers(),
    ]


def _params(phase: int) -> dict:
    content: dict = yaml.safe_load((ROOT / PARAMS / f"phase{phase}.yaml").read_text())
    return content


def _command(*words: object, environment: dict[str, str] | None = None) -> Command:
    return Command(tuple(map(str, words)), environment or {})
