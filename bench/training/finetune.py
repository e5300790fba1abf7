"""Fine-tune a language model with one adapter, and measure what that changed: `just finetune`, `just demo`."""

import contextlib
import dataclasses
import gc
import json
import math
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import machine
import pretrained
import tasks
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lora_lite as ll
from lora_lite.attachment import attachments

LINEARS = r"(q|k|v|o|gate|up|down)_proj$"
QV = r"(q|v)_proj$"

console = Console(highlight=False)


@dataclass(frozen=True)
class Budget:
    """What a run may use."""

    steps: int
    batch_size: int
    eval_problems: int
    r: int
    target_names: tuple[str, ...]
    weight_decay: float


# `gsm_symbolic` is the study's (study.py), `demo` fewer and larger steps; `metamath` is the original lora-lite's
# protocol.
BUDGETS = {
    "gsm_symbolic": Budget(120, 3, 200, 16, (LINEARS,), 0.0),
    "demo": Budget(40, 6, 32, 16, (LINEARS,), 0.0),
    "metamath": Budget(5000, 4, 1319, 32, (QV,), 0.1),
}


@dataclass(frozen=True)
class Method:
    """A variant's learning rates, and the fields of its config that differ from the others'."""

    lr: float
    """For the short budgets: where study.py has swept, the one with the lowest held-out loss."""
    protocol_lr: float = 1e-4
    """For MetaMathQA's 5,000 steps, as the original lora-lite chose it."""
    fields: dict[str, Any] = field(default_factory=dict)
    """For the short budgets."""
    protocol_fields: dict[str, Any] = field(default_factory=dict)
    """For MetaMathQA, likewise."""


METHODS = {
    "lora": Method(1e-3),
    "pissa": Method(1e-4),
    "dora": Method(1e-3),
    # With λ = 15, its default, the update is as strong as the weight: the first step would undo the model.
    "delora": Method(1e-3, 1e-3, {"lambda0": 1.0}, {"lambda0": 0.1}),
    "eva": Method(1e-4),
    "ia3": Method(3e-2, 5e-3),
    "ia3_ff": Method(3e-2, 5e-3),
    "hra": Method(3e-5),
    # 256, its default, exceeds the 192 outputs of SmolLM2's keys and values.
    "antipasto": Method(1e-2, 5e-3, {"r": 128}, {"r": 256}),
    "road": Method(3e-3, 3e-3),
}
OWN_TARGETS = ("ia3", "ia3_ff")  # keep their config's layers, as their paper has them


@dataclass
class Settings:
    """Fine-tune a language model with one adapter: held-out loss and accuracy before and after, seconds a step, memory.

    Without options: LoRA on SmolLM2-135M (from its package) and grade-school problems with fresh numbers, no network.
    Where the Hub is reached: --model Qwen/Qwen3-0.6B-Base --data metamath. Ctrl-C saves; --resume goes on.
    """

    variant: Literal["lora", "pissa", "dora", "delora", "eva", "ia3", "ia3_ff", "hra", "antipasto", "road"] = "lora"
    model: str = pretrained.SMOLLM2
    """smollm2-135m, or a name on the Hugging Face Hub, or a folder."""
    data: Literal["gsm_symbolic", "metamath"] = "gsm_symbolic"
    """gsm_symbolic needs no network; metamath trains on MetaMathQA and tests on GSM8K, both from the Hub."""
    demo: bool = False
    """The short form, a few minutes on two cores."""
    resume: bool = False
    """Go on from where Ctrl-C stopped the run with these very options."""

    steps: int | None = None
    """Default: 120; demo 40; metamath 5000."""
    batch_size: int | None = None
    """Problems a step. Default: 3; demo 6; metamath 4."""
    eval_problems: int | None = None
    """Held-out problems. Default: 200; demo 32; metamath all 1319 of GSM8K's test."""
    lr: float | None = None
    """Default: the variant's own (METHODS in this file)."""
    r: int | None = None
    """Rank. Default: 16; metamath 32; antipasto larger."""
    alpha: float | None = None
    """Default: 2r; r for pissa."""
    target_names: tuple[str, ...] | None = None
    """Regular expressions of layer names. Default: all linear layers; metamath q and v; ia3 as in its paper."""
    weight_decay: float | None = None
    """Default: 0; metamath 0.1."""
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the base model. Default: bfloat16; float32 on a CPU without instructions for it. The adapter is float32."""
    quantize: Literal["4bit", "8bit"] | None = None
    """The base's linear layers in bitsandbytes' NF4 or int8."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    backend: Literal["auto", "triton", "reference"] = "auto"
    runs: Path = Path("runs")
    """Adapter, loss curve and what --resume needs go into a folder in here."""
    results: Path = machine.RESULTS / "finetune"
    """The result's JSON goes in here."""

    def __post_init__(self) -> None:
        budget = BUDGETS["demo" if self.demo else self.data]
        for name in ("steps", "batch_size", "eval_problems", "r", "weight_decay"):
            if getattr(self, name) is None:
                setattr(self, name, self.own_fields.get(name, getattr(budget, name)))
        if self.dtype is None:
            self.dtype = pretrained.default_dtype(self.device)
        if self.lr is None:
            method = METHODS[self.variant]
            self.lr = method.protocol_lr if self.data == "metamath" else method.lr
        if self.target_names is None and self.variant not in OWN_TARGETS:
            self.target_names = budget.target_names

    @property
    def own_fields(self) -> dict[str, Any]:
        """The fields in which the variant's config differs from the others', for this data."""
        method = METHODS[self.variant]
        return method.protocol_fields if self.data == "metamath" else method.fields

    @property
    def name(self) -> str:
        parts = (self.variant, Path(self.model).name, self.data, self.quantize, "demo" if self.demo else None)
        return "-".join(filter(None, parts))

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def adapter(self) -> ll.AdapterConfig:
        """The variant's config."""
        assert self.r is not None
        fields: dict[str, Any] = {"r": self.r, "alpha": self.r if self.variant == "pissa" else 2 * self.r}
        if self.target_names is not None:
            fields |= {"target_roles": (), "target_names": self.target_names}
        config = ll.REGISTRY[self.variant].config.from_common(**self.own_fields | fields)
        return config if self.alpha is None else dataclasses.replace(config, alpha=self.alpha)

    def recorded(self) -> dict[str, Any]:
        """What a resumed run must agree on, JSON-ready."""
        values = {k: v for k, v in vars(self).items() if k not in ("resume", "runs", "results")}
        return json.loads(json.dumps(values))


class Interrupt:
    """While this is open, the first Ctrl-C sets `asked` and the second one interrupts as usual."""

    asked = False

    def __enter__(self) -> "Interrupt":
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        console.print("Stopping after this step; Ctrl-C again to stop at once.")


@dataclass
class Progressed:
    """How far a run has come: all that --resume needs beside the tensors. JSON-ready."""

    before: dict[str, float]
    losses: list[float] = field(default_factory=list)
    """Of each step so far, in nats a token."""
    seconds: list[float] = field(default_factory=list)
    """Of each step so far."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of each step so far, of all threads together: what a busy machine does not change."""
    tokens: int = 0
    """Trained on so far: those that the model read, without padding."""
    peak_memory: int = 0
    """Bytes, while training."""


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens, in nats.

    The head runs on those tokens alone: its 49,152 outputs a token are a fifth of SmolLM2's arithmetic and most of its
    memory.
    """
    hf: Any = model
    hidden = hf.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labels = batch["labels"][:, 1:]
    scored = labels != tasks.IGNORED
    return cross_entropy(hf.get_output_embeddings()(hidden[:, :-1][scored]).float(), labels[scored])


@torch.no_grad()
def held_out_loss(model: nn.Module, tokenizer: Any, task: tasks.Task, s: Settings) -> float:
    """In nats a token of the answers."""
    model.eval()
    total = count = 0.0
    for chunk in chunks(task.held_out, 16):
        batch = to(s.device, tasks.collate([tasks.encode(tokenizer, task, p) for p in chunk], tokenizer.pad_token_id))
        scored = int((batch["labels"][:, 1:] != tasks.IGNORED).sum())
        total += answer_loss(model, batch).item() * scored
        count += scored
    return total / count


@torch.no_grad()
def exact_match(model: nn.Module, tokenizer: Any, task: tasks.Task, s: Settings) -> float:
    """The share of the test problems that a greedy answer gets right."""
    hf: Any = model.eval()
    right = 0
    # Of like length together: less padding.
    prompts = [(tasks.encode(tokenizer, task, p)[0], p) for p in task.test]
    with decoding(hf):
        for chunk in chunks(sorted(prompts, key=lambda item: len(item[0])), 100):
            batch = to(s.device, tasks.collate_prompts([prompt for prompt, _ in chunk], tokenizer.pad_token_id))
            output = hf.generate(
                **batch, max_new_tokens=task.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(tasks.correct(answer, p) for answer, (_, p) in zip(answers, chunk, strict=True))
    return right / len(task.test)


@contextlib.contextmanager
def decoding(hf: Any) -> Iterator[None]:
    """While this is open, a model of `transformers` generates faster on a CPU."""
    before = hf.config._attn_implementation
    weights_stay = ll.unchanged(hf) if attachments(hf) else contextlib.nullcontext()  # the base answers too
    # Plain attention, which trains faster, copies keys and values for each query head.
    hf.set_attn_implementation("sdpa")
    try:
        # Each prompt's last position is a strided view, for which matmul would copy the head's weight once a prompt.
        last = hf.get_output_embeddings()
        with weights_stay, last.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:])):
            yield
    finally:
        hf.set_attn_implementation(before)


def evaluate(model: nn.Module, tokenizer: Any, task: tasks.Task, s: Settings) -> dict[str, float]:
    """Held-out loss in nats a token, exact-match accuracy of greedy answers, and the seconds it took."""
    start = time.perf_counter()
    return {
        "loss": held_out_loss(model, tokenizer, task, s),
        "accuracy": exact_match(model, tokenizer, task, s),
        "problems": len(task.test),
        "seconds": time.perf_counter() - start,
    }


def train(
    model: nn.Module, tokenizer: Any, task: tasks.Task, s: Settings, done: Progressed, optimizer: torch.optim.Optimizer
) -> bool:
    """Go on from where `done` stands to the last step, or to the end of the step in which Ctrl-C came: then False."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    machine.reset_peak_memory()
    with Interrupt() as interrupt, progress(s.steps, len(done.losses)) as show:
        for step in range(len(done.losses), s.steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            # Data and learning rate follow from the step alone, so a resumed run is the same run.
            problems = [task.train[i % len(task.train)] for i in range(step * s.batch_size, (step + 1) * s.batch_size)]
            batch = tasks.collate([tasks.encode(tokenizer, task, p) for p in problems], tokenizer.pad_token_id)
            for group in optimizer.param_groups:
                group["lr"] = s.lr * schedule(step, s.steps)
            loss = answer_loss(model, to(s.device, batch))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done.losses.append(loss.item())
            done.seconds.append(time.perf_counter() - start)
            done.cpu_seconds.append(time.process_time() - cpu_start)
            tokens = int(batch["attention_mask"].sum())
            done.tokens += tokens
            show(len(done.losses), done.losses[-1], tokens / done.seconds[-1])
            if interrupt.asked:
                break
    done.peak_memory = max(done.peak_memory, machine.peak_memory())
    return len(done.losses) == s.steps


def schedule(step: int, steps: int, warmup: float = 0.05) -> float:
    """Factor on the learning rate: a linear rise over the first twentieth, then half a cosine towards 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def save_run(model: nn.Module, optimizer: torch.optim.Optimizer, s: Settings, done: Progressed) -> None:
    """The adapter, the optimiser's moments and the progress, as safetensors and JSON: nothing to unpickle."""
    s.folder.mkdir(parents=True, exist_ok=True)
    (s.folder / "progress.json").unlink(missing_ok=True)  # written last: what is there without it is not resumed
    ll.save(model, s.folder / "adapter.safetensors")
    moments = {
        f"{i}.{name}": value for i, state in optimizer.state_dict()["state"].items() for name, value in state.items()
    }
    save_file(moments, s.folder / "optimizer.safetensors")
    (s.folder / "progress.json").write_text(json.dumps({"settings": s.recorded(), "done": dataclasses.asdict(done)}))


def saved_progress(s: Settings) -> Progressed:
    """How far the run to resume came. A run that differs in a setting is another run: SystemExit."""
    try:
        saved = json.loads((s.folder / "progress.json").read_text())
    except OSError:
        sys.exit(f"Nothing to resume: {s.folder} holds no stopped run.")
    now = s.recorded()
    differing = [f"{k} was {v!r} and is {now.get(k)!r}" for k, v in saved["settings"].items() if v != now.get(k)]
    if differing:
        sys.exit(f"The run in {s.folder} had other settings: {'; '.join(differing)}.")
    return Progressed(**saved["done"])


def make_optimizer(parameters: Sequence[nn.Parameter], s: Settings, resume: bool = False) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay)
    if resume:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(s.folder / "optimizer.safetensors").items():
            index, _, kind = name.partition(".")
            moments.setdefault(int(index), {})[kind] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return optimizer


def attach(model: nn.Module, tokenizer: Any, task: tasks.Task, s: Settings) -> ll.Attachment:
    """A new adapter. Variants that look at data get four training batches."""
    cfg = s.adapter()
    data = None
    if ll.REGISTRY[s.variant].calibration != "none":
        data = [
            {k: v for k, v in to(s.device, tasks.collate(chunk, tokenizer.pad_token_id)).items() if k != "labels"}
            for chunk in chunks(
                [tasks.encode(tokenizer, task, p) for p in task.train[: 4 * s.batch_size]], s.batch_size
            )
        ]
    return ll.attach(model, cfg, backend=s.backend, calibration_data=data)


@torch.no_grad()
def logits(model: nn.Module, tokenizer: Any, task: tasks.Task, s: Settings) -> Tensor:
    """On the first four test problems."""
    batch = tasks.collate_prompts([tasks.encode(tokenizer, task, p)[0] for p in task.test[:4]], tokenizer.pad_token_id)
    return model.eval()(**to(s.device, batch)).logits.float().cpu()


def draw_curve(path: Path, s: Settings, done: Progressed, after: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    smooth, mean = [], done.losses[0]
    for loss in done.losses:
        mean += 0.1 * (loss - mean)
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(smooth) + 1)
    axes.plot(steps, done.losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
    axes.plot([0, len(smooth)], [done.before["loss"], after["loss"]], "o", color="tab:orange", label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=s.name, ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def to(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in batch.items()}


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


@contextlib.contextmanager
def progress(steps: int, done: int) -> Iterator[Any]:
    """Gives show(step, loss, tokens a second): a bar on a terminal, a line every tenth of the way elsewhere."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=steps, completed=done, loss=math.nan, rate=math.nan)

        def show(step: int, loss: float, rate: float) -> None:
            bar.update(row, completed=step, loss=loss, rate=rate)
            if bar.disable and (step % max(1, steps // 10) == 0 or step == steps):
                console.print(f"step {step}/{steps}  loss {loss:.3f}  {rate:.0f} tokens/s")

        yield show


def run(s: Settings) -> dict[str, Any]:
    """The whole of it; returns what goes into the result's JSON."""
    start = time.perf_counter()
    torch.manual_seed(s.seed)
    pretrained.settle_network(needs_hub=not pretrained.is_local(s.model) or s.data == "metamath")
    done = saved_progress(s) if s.resume else None

    console.print(f"{s.name}: loading the model and the problems")
    try:
        with console.status("loading"):
            task = tasks.TASKS[s.data](s.steps * s.batch_size, s.eval_problems, s.seed)
            tokenizer = pretrained.tokenizer(s.model)
            model = pretrained.load(s.model, getattr(torch, s.dtype), s.device, s.quantize)
    except pretrained.NotReachedError as error:
        sys.exit(str(error))
    if done is None:
        done = Progressed(evaluate(model, tokenizer, task, s))
        attachment = attach(model, tokenizer, task, s)
    else:
        attachment = ll.load(model, s.folder / "adapter.safetensors", backend=s.backend)
        console.print(f"resumed at step {len(done.losses)}")
    report("before", done.before)
    console.print(f"{attachment.trainable:,} trainable parameters on {len(attachment.targets)} layers")

    optimizer = make_optimizer(ll.parameters(model), s, s.resume)
    finished = train(model, tokenizer, task, s, done, optimizer)
    save_run(model, optimizer, s, done)
    if not finished:
        command = shlex.join(["just", "finetune", *(a for a in sys.argv[1:] if a != "--resume")])
        console.print(f"Saved in {s.folder} after {len(done.losses)} steps. Go on with: {command} --resume")
        sys.exit(130)

    after = evaluate(model, tokenizer, task, s)
    report("after", after)
    trained = logits(model, tokenizer, task, s)
    trainable, layers, cfg = attachment.trainable, len(attachment.targets), attachment.cfg.to_dict()
    del model, optimizer, attachment
    gc.collect()
    difference = (reloaded_logits(tokenizer, task, s) - trained).abs().max().item()
    draw_curve(s.folder / "loss.png", s, done, after)
    result = {
        "kind": "timed",
        "variant": s.variant,
        "settings": s.recorded(),
        "adapter": cfg,
        "trainable_parameters": trainable,
        "layers": layers,
        "before": done.before,
        "after": after,
        "seconds_per_step": statistics.median(done.seconds),
        "tokens_per_second": done.tokens / sum(done.seconds),
        "tokens": done.tokens,
        "peak_memory_bytes": done.peak_memory,
        "reloaded_max_abs_logit_difference": difference,
        "wall_seconds": time.perf_counter() - start,
        "resumed": s.resume,
        "losses": done.losses,
    }
    machine.write(s.results / f"{s.name}.json", result)
    return result


def reloaded_logits(tokenizer: Any, task: tasks.Task, s: Settings) -> Tensor:
    """Of a base loaded anew, with the saved adapter."""
    fresh = pretrained.load(s.model, getattr(torch, s.dtype), s.device, s.quantize)
    ll.load(fresh, s.folder / "adapter.safetensors", backend=s.backend)
    return logits(fresh, tokenizer, task, s)


def report(when: str, found: dict[str, float]) -> None:
    console.print(
        f"{when:>6}: held-out loss {found['loss']:.3f} nats a token, {100 * found['accuracy']:.1f} % of "
        f"{found['problems']:.0f} answers right ({found['seconds']:.0f} s)"
    )


def main(s: Settings) -> None:
    try:
        result = run(s)
    except KeyboardInterrupt:
        console.print("Stopped. What was saved before, if anything, is still there.")
        sys.exit(130)
    console.print(
        f"{result['seconds_per_step']:.2f} s a step (median), {result['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB, {result['wall_seconds']:.0f} s in all\n"
        f"saved, reloaded into a fresh model: logits differ by at most "
        f"{result['reloaded_max_abs_logit_difference']:.1e}\n"
        f"{s.folder}/adapter.safetensors; {s.results / s.name}.json\n"
        f"{s.folder}/loss.png"
    )
    if result["reloaded_max_abs_logit_difference"] > 1e-3:
        sys.exit("The reloaded adapter does not compute what the trained one did.")


if __name__ == "__main__":
    main(tyro.cli(Settings))
