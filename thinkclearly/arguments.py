"""Dataclasses of the command line's options, a job each; what a recipe of training holds is `config`'s."""

from __future__ import annotations

from dataclasses import dataclass, field

from thinkclearly.config import DTYPES, check_choice, option


@dataclass
class LoadArguments:
    """The model that answers."""

    model: str = option("outputs/clear", "Fine-tune (folder or Hub id), ours or the original's directory format.")
    base: str | None = option(None, "Base model to use instead of the one that the fine-tune names.")
    dtype: str = option("float32", "float32, bfloat16 or float16.")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps; the best there is if not given.")
    load_in_8bit: bool = option(False, "The language model in 8 bits (bitsandbytes): half the memory of bfloat16.")
    load_in_4bit: bool = option(False, "The language model in 4 bits (bitsandbytes, NF4): a quarter.")
    compile: bool = option(False, "torch.compile the language model: minutes at first, for many pictures on a GPU.")

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other; give one of them")


@dataclass
class EditArguments(LoadArguments):
    """One picture, or many: every process of an `accelerate launch` takes its share of `input`."""

    image: str | None = option(None, "Picture to edit, any size.")
    input: str | None = option(
        None, "Instead of image: a folder of pictures, a .jsonl file (image, instruction) or a data set."
    )
    instruction: str | None = option(None, "What to change; with input, where an item does not say it itself.")
    output_dir: str = option("outputs/edit", "Where the pictures and result.json go.")
    num_images: int = option(1, "Samples.")
    seed: int = option(0, "Keys all noise: the same seed gives the same picture.")
    trace: bool = option(False, "Write token_trace.jsonl, one line a position; not with input.")
    batch_size: int = option(8, "input: pictures that a process edits at once.")
    split: str = option("train", "input: split of a data set on the Hub.")
    on_bad_record: str = option("error", "input: error stops at a bad item, skip leaves it out and lists it.")

    def __post_init__(self):
        super().__post_init__()
        check_choice("on_bad_record", self.on_bad_record, ("error", "skip"))
        if (self.image is None) == (self.input is None):
            raise ValueError("give either --image, one picture, or --input, a folder, .jsonl file or data set")
        if self.image is not None and self.instruction is None:
            raise ValueError("--image needs --instruction: what to change, e.g. 'Make the scarf blue.'")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; expected 1 or more")


@dataclass
class GenerateArguments(LoadArguments):
    """Pictures from words."""

    prompt: str = field(default="", metadata={"help": "What to draw.", "required": True})
    output_dir: str = option("outputs/generate", "Where 0000.png, 0001.png, … go.")
    num_images: int = option(1, "Samples.")
    seed: int = option(0, "Keys all noise.")


@dataclass
class DescribeArguments(LoadArguments):
    """Words about a picture."""

    image: str = field(default="", metadata={"help": "Picture to look at.", "required": True})
    question: str = option("What is in the picture?", "Question about it.")
    num_answers: int = option(1, "Samples.")
    max_new_tokens: int = option(128, "Length limit of an answer, tokens.")
    temperature: float = option(0.0, "0 answers greedily.")
    top_k: int = option(0, "Sample from the k best words; 0 for all.")
    top_p: float = option(1.0, "Sample from the smallest set of words with this probability mass.")
    seed: int = option(0, "Seed of the sampling.")


@dataclass
class PrepareArguments:
    """What else preparation writes."""

    output_dir: str = option("outputs/data", "Where statistics, plots and the sheet of examples go.")
    jsonl: str | None = option(None, "Also write the training records as JSONL with '<CLEAR>' words to this file.")
    export_folder: str | None = option(None, "Also write the photo pairs as sample_XXXX folders.")


@dataclass
class CalibrateArguments(LoadArguments):
    """A fine-tune whose gate is fitted to held-out records."""

    batch_size: int = option(16, "Pictures that are edited at once.")


@dataclass
class PushArguments:
    """A repository on the Hub: a fine-tune, its merged weights, or tokenized data."""

    model: str = option("outputs/clear", "Folder that train wrote, a checkpoint in it, or a folder of prepared data.")
    repo_id: str = field(default="", metadata={"help": "Where to: owner/name, made if not there.", "required": True})
    private: bool = option(False, "Make a new repository private; else it is what the account's default says.")
    revision: str | None = option(None, "Branch to push to, made if not there; main if not given.")
    create_pr: bool = option(False, "Open a pull request instead of committing.")
    token: str | None = option(None, "Write token; better: `hf auth login` or HF_TOKEN, which no process list shows.")
    base_model_id: str | None = option(None, "Hub id of the base model, where training used a local folder.")
    license: str | None = option(None, "License of the card; what the base model's page says if not given.")
    pt: bool = option(False, "Add original/, the same fine-tune with gen_head_clear.pt for the original's script.")
    merged: str | None = option(None, "Whole weights instead of an adapter: native or deepseek layout.")
    dtype: str = option("bfloat16", "merged: float32, bfloat16 or float16.")
    max_shard_size: str = option("5GB", "merged: largest weight file.")

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        if self.merged is not None:
            check_choice("merged", self.merged, ("native", "deepseek"))


@dataclass
class ConvertArguments:
    """Between DeepSeek's file layout and transformers' own."""

    model: str = field(default="", metadata={"help": "Folder or Hub id, either layout.", "required": True})
    output_dir: str = field(default="", metadata={"help": "Folder to write.", "required": True})
    to: str = option("native", "native (transformers) or deepseek.")
    dtype: str = option("bfloat16", "float32, bfloat16 or float16.")

    def __post_init__(self):
        check_choice("to", self.to, ("native", "deepseek"))
        check_choice("dtype", self.dtype, DTYPES)
