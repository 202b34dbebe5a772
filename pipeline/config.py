"""What a user may say to each command: one frozen model a command, a docstring under each field.

The command line, the YAML file (`--config`) and `--set a.b=c` all end here, by way of `pipeline.said`. Commands that look after
a store are in `pipeline.upkeep`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator

from store.stores import Stores, parse

Count = Annotated[int, Field(ge=1)]
Place = Annotated[Path, AfterValidator(Path.expanduser)]
Share = Annotated[float, Field(ge=0, lt=1)]
Where = Annotated[Stores, PlainValidator(parse), PlainSerializer(str, return_type=str)]
Layers = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class OfStore(Frozen):
    """Whatever has to do with caches and runs."""

    store: Where = Stores((Path("cache"),))
    """folder of caches and runs; or s3://bucket/prefix for caches; or several, comma-separated: what is new goes to the first"""


class Catalog(OfStore):
    """Caches and runs under STORE."""


class _OnDevice(OfStore):
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, mps"""


class Inputs(_OnDevice):
    """What fixes a cache, as the user says it."""

    task: str = "demo"
    """name of a task (demo, or one of GLUE's), or the path of a .yaml file that describes your own"""
    backbone: str = "minilm"
    """minilm (embedded), the folder of a checkpoint, or a hub id"""
    data: Place | None = None
    """folder with <task>/<split>.parquet, .csv or .jsonl; where left out: the hub, or the task's own files"""
    tokens: str | None = None
    """which tokens of an example are kept: all, first, last, their mean, or first+mean; where left out, by the kind of backbone:
    the mean of an encoder's, a decoder's last, all of an encoder-decoder's, an image's first (class) token"""
    layers: Layers = "all"
    """which depths are kept: all, or numbers and ranges such as 0,2,4-6 (0 is the embedding)"""
    codec: str = "bf16"
    """how states are stored: fp32, bf16, int8 or int4; with +blosc behind it (bf16+blosc) compressed too, for cold storage"""
    max_length: Annotated[int, Field(ge=2)] = 128
    """longest text, in tokens; longer ones are cut"""
    prompt: str | None = None
    """the text that the backbone reads, {column} for each of the task's columns; where left out: the columns themselves, and the
    task's own prompt for decoders and encoder-decoders"""
    words: str | None = None
    """label words of one token each, comma-separated in the order of the classes, for HEAD=verbalizer; where left out: the
    task's own"""
    limit: Count | None = None
    """examples a split, a seeded sample; where left out: all"""
    order_seed: Annotated[int, Field(ge=0)] = 0
    """seed of the cache's order on disk and of LIMIT's sample; part of the recipe, unlike --seed"""
    reuse: bool = False
    """copy the rows of inputs that another cache of the same backbone and choices has; off, since they went through the backbone
    in other batches, which gives other last bits"""
    seed: Annotated[int, Field(ge=0)] = 0
    """seed of training (weights, order of batches, held-out part); no part of a cache"""


class Plan(Inputs):
    """What stage one would do: examples, tokens, exact bytes, free disk, estimated time; hit or miss."""

    splits: str | None = None
    """comma-separated splits; where left out: every split that the task has"""


class _Spread(Inputs):
    dask: str | None = None
    """address of a dask scheduler whose workers share STORE, such as tcp://host:8786; where left out: this process"""
    no_wait: bool = False
    """extract beside somebody who is extracting the same cache, rather than wait for it"""


class Extract(_Spread, Plan):
    """Stage one: run the frozen backbone once and write its states to the cache."""

    @classmethod
    def part_of(cls, config: Inputs, splits: str) -> "Extract":
        """The extraction of some splits that another command asks for."""
        known = {name: getattr(config, name) for name in cls.model_fields if hasattr(config, name)}
        return cls(**known | {"splits": splits})


class ReadOptions(Frozen):
    """Less common choices of READ, for the YAML file and --set read.…"""

    aggregate: Literal["mean", "last"] = "mean"
    """of READ's states over depth"""
    initial: Literal["zero", "embedding"] = "zero"
    """READ's first state"""
    layers: Layers = "all"
    """the blocks that READ runs over, of those in the cache: all, or numbers and ranges such as 2,4-6"""
    bidirectional: bool = False
    """whether a second cell runs from the last block to the first"""
    joiner: Literal["attention", "none"] | None = None
    """of an encoder-decoder: whether the encoder's READ speaks to the decoder's through the frozen cross-attention; where left
    out: attention if the cache has all tokens"""
    scale_in: float = 1.0
    """s_in: scale of the normed inputs"""
    scale_out: float = 1.0
    """s_out: scale of the correction"""
    standardise: bool | None = None
    """whether a classifier or regressor reads the states in units of their spread over a sample that trains, or as they are;
    where left out: for images"""
    dropout: Share = 0.1
    """in the head"""
    shared: bool = False
    """of several tasks: whether one READ serves them all, with a head for each"""


class ScheduleOptions(Frozen):
    """Less common choices of training, for the YAML file and --set schedule.…"""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """of matrices, per AdamW"""
    warmup: Share = 0.06
    """share of training over which the learning rate rises"""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """largest norm of the gradient"""
    patience: Count = 3
    """epochs without a better score before training stops"""
    hold_out: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """share of the train split that chooses the epoch and is not trained on"""
    stream_seed: Annotated[int, Field(ge=0)] | None = None
    """seed of that part and of the order of batches, which heads that train together share; where left out: --seed"""


class ReadingOptions(Frozen):
    """How stage two reads caches, for the YAML file and --set reading.…"""

    access: Literal["auto", "memory", "random", "windows"] = "auto"
    """memory: decoded once and kept; random: rows of any examples, mapped; windows: whole chunks, some at a time; auto: memory
    up to the limit, random on a fast local disk, else windows"""
    memory_bytes: Annotated[int, Field(ge=0)] = 2 << 30
    """what a run's caches may take, decoded, where auto is to keep them in memory, in bytes"""
    window_bytes: Count = 1 << 30
    """of one window, in bytes; at most two are in memory"""
    readers: Count = 2
    """threads that read ahead"""
    mirror: bool = False
    """copy caches of other stores to the first folder of STORE, and read them there"""


class Train(_Spread):
    """Stage two: train a READ from the cache; extracts first only what is missing. Of several tasks, or several seeds, those on
    the same inputs train from one stream."""

    label: str | None = None
    """the column that holds the labels; where left out: the task's own"""
    cell: str = "gru"
    """READ's cell: rnn, gru, lstm or mingru"""
    hidden: Count = 256
    """READ's width H"""
    pool: str | None = None
    """rows to one vector: attention, mean, first or last, as the token rule allows; where left out: its default"""
    head: Literal["classifier", "verbalizer"] = "classifier"
    """what answers: a classifier (of numbers: a regressor), or the label words' rows of the frozen output embedding"""
    epochs: Count = 10
    """at most; training stops early without progress"""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """peak learning rate"""
    batch: Count = 32
    """examples a step"""
    seeds: Count = 1
    """how many heads, with seeds from SEED on: their mean and standard deviation are told"""
    track: Literal["none", "tensorboard", "trackio"] = "none"
    """of `train` and `sweep`: who is told of each epoch beside the JSON lines under STORE; needs the `track` extra"""
    cache: str | None = None
    """prefix of a fingerprint, to choose where several caches match"""
    no_extract: bool = False
    """fail rather than extract what is missing"""
    read: ReadOptions = ReadOptions()
    """less common choices of READ"""
    schedule: ScheduleOptions = ScheduleOptions()
    """less common choices of training"""
    reading: ReadingOptions = ReadingOptions()
    """how caches are read"""


class Ablate(Train):
    """READ beside its controls: the same head on other readings of the same cache, over several seeds."""

    seeds: Annotated[int, Field(ge=2)] = 5
    """how many, from SEED on"""


class Sweep(Train):
    """Train many heads that differ in what a grid says, WIDTH of them in one pass; what is trained is not trained again."""

    grid: Place | None = None
    """.yaml file: option -> values, every combination of which is trained; or a list of such grids"""
    trials: Count | None = None
    """with the `sweep` extra: Optuna proposes so many settings from the grid's values and ranges; where left out: all of it"""
    width: Count = 32
    """heads that train in one pass"""


class Report(OfStore):
    """One HTML page and one Markdown file under STORE: what the runs there say."""


class _OfRun(_OnDevice):
    run: str | None = None
    """name of a run (or the start of it), or its folder"""
    task: str | None = None
    """task of the run, where its name alone is not unique"""
    split: str | None = None
    """split in the cache"""


class Evaluate(_OfRun):
    """Scores of a saved run on a split, from the cache; where SPLIT is left out: the splits it was scored on."""

    batch: Count = 256
    """examples at a time"""


class Predict(_OfRun):
    """Labels for new text or images with a saved run, or for a split of the cache (--split test)."""

    text: str | None = None
    """a text"""
    text_pair: str | None = None
    """the second text, where the task takes pairs"""
    file: Place | None = None
    """.jsonl file, a line an example, with the task's text columns; of an image task an image, or a folder of them"""
    backbone: str | None = None
    """where the run's backbone lies now, if it moved"""


class Bench(Train):
    """Measure what the README shows. `extract`: stage one beside the bare forward pass. `read`: the loader beside its peers.
    `codec`: bytes, and what a codec costs in quality. `train`: a step with loading beside one without, and memory. `heads`: many
    heads in one pass beside one after another. `all`: these five. `glue` trains every GLUE task on one backbone, `recipes`
    compares variants of the defaults, `store` looks through ten thousand caches."""

    what: str = "all"
    """which table"""
    task: str = ""
    """comma-separated tasks; where left out: those of the table in the README"""
    only: str | None = None
    """of `recipes`: these variants, comma-separated"""
    seeds: Count = 3
    """of `recipes` and `codec`: how many"""
    repeats: Count = 5
    """of `extract`, `read`, `train`, `heads`: how often each is timed, in turn with what it is compared with; medians are told"""

    def tasks(self, *default: str) -> list[str]:
        """The tasks that are asked for."""
        return self.task.split(",") if self.task else list(default)

    def training(self, task: str, **changes: Any) -> Train:
        """The training of one of them, with changes."""
        said = {name: getattr(self, name) for name in Train.model_fields}
        return Train(**said | {"task": task, "seeds": 1} | changes)
