"""Pretrain the embedded backbone: a tiny Llama-style language model, from public text, on a CPU.

    python -m deploy.demo.build_backbone --data FOLDER --output deploy/demo/backbone

The text is that of ``deploy.demo.corpus``. Everything is seeded: the same text, seed, number of steps,
thread count and torch build give the same model. The folder it writes holds fp16 weights
(safetensors), the tokenizer and a model card whose figures this script measured.
Muon needs torch 2.9 or newer. It is a smoke-test model: large enough to be fine-tuned visibly in a minute, far
too small to know anything.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.errors import InvalidInput
from deploy.demo.card import Figures, write_card
from deploy.demo.corpus import Corpus, read_corpus

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the backbone, apart from the text and the number of steps.

    Attributes:
        vocab_size: entries of the byte-level BPE tokenizer, special tokens included.
        hidden_size, intermediate_size, layers, heads: shape of the model.
        context: tokens the model can see, and the length of a training window.
        windows_per_step: windows in one optimizer step.
        document_tokens: a document longer than this is cut, so that long tables do not fill the corpus.
        muon_rate: Muon's learning rate, for the matrices of the layers.
        adam_rate: AdamW's, for the embedding and the norms.
        weight_decay: both optimizers', as a share of the weights per unit of learning rate.
        warmup_steps: both rates rise over these steps, stay, and fall as a cosine to 2 % in the second half.
        seed: order of the text, windows and initial weights.
    """

    vocab_size: int = 3072
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    context: int = 256
    windows_per_step: int = 8
    document_tokens: int = 512
    muon_rate: float = 0.015
    adam_rate: float = 0.006
    weight_decay: float = 0.02
    warmup_steps: int = 40
    seed: int = 20260105


def train_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own.

    It puts ``BOS`` in front of a text and never appends ``EOS``. Single digits let a small model copy a number
    it has never seen.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Return the model with seeded initial weights, in float32, without dropout."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def to_windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> torch.Tensor:
    """Return documents one after another, each ``BOS … EOS``, as windows of ``context + 1`` tokens.

    Returns:
        int64 [windows, context + 1]; the last window is filled with padding.
    """
    stream: list[int] = []
    for ids in tokenizer(list(texts), verbose=False)["input_ids"]:
        stream += [*ids[: recipe.document_tokens - 1], tokenizer.eos_token_id]
    missing = -(len(stream) - 1) % recipe.context
    stream += [tokenizer.pad_token_id] * missing
    starts = range(0, len(stream) - 1, recipe.context)
    return torch.tensor([stream[start : start + recipe.context + 1] for start in starts], dtype=torch.long)


def mean_loss(model: LlamaForCausalLM, windows: torch.Tensor, *, pad_token_id: int) -> torch.Tensor:
    """Return the mean cross-entropy per token (nats) of windows [n, context + 1], padding left out."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), ignore_index=pad_token_id)


@torch.no_grad()
def held_out_loss(folder: Path, windows: torch.Tensor, *, pad_token_id: int) -> float:
    """Return the loss (nats per token) of the model as saved in ``folder``, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for part in windows.split(32):
        counted = int((part[:, 1:] != pad_token_id).sum())
        total += counted * mean_loss(model, part, pad_token_id=pad_token_id).item()
        tokens += counted
    return total / tokens


def _batches(windows: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    order = torch.Generator().manual_seed(recipe.seed)
    while True:
        for rows in torch.randperm(len(windows), generator=order).split(recipe.windows_per_step):
            yield windows[rows]


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    layers, others = [], []
    for name, weight in model.named_parameters():
        (layers if weight.ndim == 2 and "embed" not in name else others).append(weight)
    return [
        torch.optim.Muon(layers, lr=recipe.muon_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay),
    ]


def _scale(progress: float, step: int, recipe: Recipe) -> float:
    """Return the factor on both learning rates at ``progress`` (0 to 1) of the run."""
    falling = min(1.0, max(0.0, 2 * progress - 1))
    return min(1.0, (step + 1) / recipe.warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))


def name_tokenizer_class(path: Path) -> None:
    """Name the class every supported transformers knows; 5.x writes a name that 4.x cannot load."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (fp16, safetensors) and tokenizer into ``folder``, replacing what is there at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        beside = Path(scratch) / "backbone"
        half = LlamaForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        name_tokenizer_class(beside / "tokenizer_config.json")
        for path in beside.iterdir():
            path.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)


def pretrain(corpus: Corpus, output: Path, recipe: Recipe, *, steps: int, minutes: float, save_every: int) -> Figures:
    """Train for ``steps`` optimizer steps or ``minutes`` of wall time, whichever ends first, and write ``output``.

    Stopping by the clock depends on the machine; only a run that ends by ``steps`` can be repeated exactly.

    Returns:
        What was measured, as written into the model card.
    """
    tokenizer = train_tokenizer(corpus.training, recipe)
    windows = to_windows(corpus.training, tokenizer, recipe)
    held_out = to_windows(corpus.held_out, tokenizer, recipe)
    model = make_model(tokenizer, recipe)
    batches, started, done, smoothed = _batches(windows, recipe), time.monotonic(), 0, 0.0
    optimizers = _optimizers(model, recipe)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    while done < steps and (elapsed := time.monotonic() - started) < 60 * minutes:
        scale = _scale(max(done / steps, elapsed / (60 * minutes)), done, recipe)
        loss = mean_loss(model, next(batches), pad_token_id=tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = scale * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done += 1
        smoothed = loss.item() if done == 1 else 0.98 * smoothed + 0.02 * loss.item()
        if done % save_every == 0:
            save(model, tokenizer, output)
            print(f"step {done}/{steps}  loss {smoothed:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    save(model, tokenizer, output)
    figures = Figures(
        parameters=sum(weight.numel() for weight in model.parameters()),
        steps=done,
        tokens_seen=done * recipe.windows_per_step * recipe.context,
        documents=len(corpus.training),
        held_out_documents=len(corpus.held_out),
        held_out_loss=held_out_loss(output, held_out, pad_token_id=tokenizer.pad_token_id),
        seconds=time.monotonic() - started,
        threads=torch.get_num_threads(),
    )
    write_card(output, figures, recipe=asdict(recipe), sources=corpus.sha256)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, pretrain, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two public files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the backbone into")
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this wall time (default: never)")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.minutes <= 0 or given.save_every < 1 or given.threads < 1:
        parser.error("--steps, --minutes, --save-every and --threads must be positive")
    torch.set_num_threads(given.threads)
    recipe = Recipe()
    try:
        corpus = read_corpus(given.data, seed=recipe.seed)
    except InvalidInput as error:
        parser.error(str(error))
    limits = {"steps": given.steps, "minutes": given.minutes, "save_every": given.save_every}
    print(pretrain(corpus, given.output, recipe, **limits))


if __name__ == "__main__":
    main()
