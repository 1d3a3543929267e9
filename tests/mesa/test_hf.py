"""The Hugging Face shells: generation from states, padding, beams, continuation, loss, prior, saving and loading."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from commissure.core.errors import BackendMissing, InputError
from commissure.core.rng import isolated, torch_generator
from commissure.mesa.config import MesaNetConfig

pytest.importorskip("transformers")

from commissure.mesa.hf import MesaNetForCausalLM, MesaNetModel, MesaNetPreTrainedConfig, StateCache
from commissure.nn.decay import exempted

VOCAB, PAD = 19, 1
HYBRIDS: list[Literal["hawk"] | None] = [None, "hawk"]


def config(**changes: Any) -> MesaNetConfig:
    fields: dict[str, Any] = {"vocab": VOCAB, "dim": 16, "blocks": 2, "heads": 2, "head_dim": 6, "tie": False}
    return MesaNetConfig(**{**fields, "bos_token_id": 0, "pad_token_id": PAD, **changes})


def language_model(hybrid: Literal["hawk"] | None = None, **changes: Any) -> MesaNetForCausalLM:
    """In float64 and, unless `tie=True`, untied: a new tied model repeats its last token."""
    with isolated(3, "model"):
        model = MesaNetForCausalLM(config(hybrid=hybrid, **changes)).double().eval()
    return model.requires_grad_(False)


def texts(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, time), generator=torch_generator(seed, "texts"))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    tokens = torch.stack([F.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return tokens, mask


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_greedy_with_cache_is_full_recomputation_token_by_token(hybrid: Literal["hawk"] | None) -> None:
    model, prompt = language_model(hybrid), texts(2, 7)
    generated = model.generate(
        prompt, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert isinstance(generated.past_key_values, StateCache)
    tokens = prompt
    for step in range(12):
        logits = model(tokens, use_cache=False).logits[:, -1]
        torch.testing.assert_close(generated.logits[step].double(), logits, rtol=1e-5, atol=1e-6)  # they are float32
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated.sequences, tokens)
    assert len(set(tokens[:, 7:].flatten().tolist())) > 2  # not one token over and over


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_a_padded_batch_is_each_row_alone(hybrid: Literal["hawk"] | None) -> None:
    model = language_model(hybrid)
    rows = [texts(1, length, seed=length)[0] for length in (9, 4, 1)]
    tokens, mask = left_padded(rows)
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    logits = model(tokens, attention_mask=mask).logits
    for index, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=8, do_sample=False)[0]
        assert torch.equal(together[index, len(tokens[0]) - len(row) :], alone)
        torch.testing.assert_close(logits[index, -len(row) :], model(row[None]).logits[0], rtol=0, atol=1e-10)


def test_zeros_anywhere_in_the_mask_are_skipped() -> None:
    model, tokens = language_model("hawk"), texts(2, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    outputs = model.model(tokens, attention_mask=mask, use_cache=True)
    kept = model.model(tokens[:1, mask[0] == 1]).last_hidden_state
    torch.testing.assert_close(outputs.last_hidden_state[:1, mask[0] == 1], kept, rtol=0, atol=1e-10)
    assert not outputs.last_hidden_state[mask == 0].any()
    assert outputs.past_key_values.state.position.tolist() == [5, 0]
    follow = model.model(tokens[:, :3], past_key_values=outputs.past_key_values).last_hidden_state
    torch.testing.assert_close(follow[1:], model.model(tokens[1:, :3]).last_hidden_state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("pieces", [[5, 1, 6], [1] * 12, [11, 1], [3, 0, 9]], ids=["5-1-6", "steps", "11-1", "3-0-9"])
def test_a_text_in_pieces_is_the_whole_text(hybrid: Literal["hawk"] | None, pieces: list[int]) -> None:
    model, tokens = language_model(hybrid), texts(2, 12)
    whole = model(tokens, use_cache=True)
    cache, logits = StateCache(), []
    for piece in tokens.split(pieces, dim=1):
        logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=0, atol=1e-10)
    assert cache.get_seq_length() == whole.past_key_values.get_seq_length() == 12


def test_generation_continues_a_cache_and_prefills_in_chunks() -> None:
    model = language_model()
    tokens, mask = left_padded([texts(1, 9)[0], texts(1, 5)[0]])
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    chunked = model.generate(
        tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, prefill_chunk_size=4, use_cache=True
    )
    assert torch.equal(chunked, expected)
    cache = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    resumed = model.generate(tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(resumed, expected)
    assert torch.equal(model.generate(tokens, attention_mask=mask, max_new_tokens=6, use_cache=False), expected)


def test_a_copied_cache_forks_the_text() -> None:
    model, tokens = language_model(), texts(1, 6)
    cache = model(tokens, use_cache=True).past_key_values
    fork = copy.copy(cache)
    first = model(texts(1, 3, seed=1), past_key_values=cache).logits
    model(texts(1, 3, seed=2), past_key_values=fork)
    assert cache.get_seq_length() == fork.get_seq_length() == 9
    torch.testing.assert_close(first, model(torch.cat([tokens, texts(1, 3, seed=1)], 1)).logits[:, 6:])


def test_a_cache_is_left_alone_without_use_cache() -> None:
    model, tokens = language_model(), texts(1, 6)
    cache = model(tokens, use_cache=True).past_key_values
    output = model(tokens, past_key_values=cache, use_cache=False)
    assert output.past_key_values is None
    assert cache.get_seq_length() == 6
    assert model.train()(tokens).past_key_values is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_configuration_says_whether_to_cache(tmp_path: Path, use_cache: bool) -> None:
    model = MesaNetForCausalLM(MesaNetPreTrainedConfig(**config().model_dump(), use_cache=use_cache))
    model.save_pretrained(tmp_path)
    loaded = MesaNetForCausalLM.from_pretrained(tmp_path)
    assert [m.eval()(texts(1, 3)).past_key_values is not None for m in (model, loaded)] == [use_cache] * 2


def test_the_cache_does_not_grow() -> None:
    from commissure.core.mixer import nbytes

    model = language_model("hawk")
    short, long = (model(texts(1, time), use_cache=True).past_key_values for time in (3, 60))
    assert nbytes(short.state) == nbytes(long.state)


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_beams_with_cache_are_beams_without(hybrid: Literal["hawk"] | None) -> None:
    model = language_model(hybrid)
    tokens, mask = left_padded([texts(1, 6)[0], texts(1, 3)[0]])
    options: dict[str, Any] = {"max_new_tokens": 7, "num_beams": 4, "num_return_sequences": 3, "do_sample": False}
    cached = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options))
    assert len({tuple(row) for row in cached.tolist()}) == 6


def test_beams_reorder_the_states() -> None:
    model, tokens = language_model("hawk"), texts(3, 5)
    cache = model(tokens, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    after = model(texts(3, 2, seed=1), past_key_values=cache).logits
    expected = model(torch.cat([tokens[[2, 0, 2]], texts(3, 2, seed=1)], 1)).logits[:, 5:]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([4]))
    expected = model(torch.cat([tokens[[2]], texts(3, 2, seed=1)[[2]], tokens[:1]], 1)).logits[:, 7:]
    torch.testing.assert_close(model(tokens[:1], past_key_values=cache).logits, expected, rtol=0, atol=1e-10)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_sampling_follows_the_predicted_distribution() -> None:
    model, prompt = language_model(), texts(1, 4)
    with isolated(0, "sample"):
        drawn = model.generate(prompt.expand(4000, -1), max_new_tokens=1, do_sample=True, top_k=0)[:, -1]
    frequencies = torch.bincount(drawn, minlength=VOCAB) / 4000
    expected = model(prompt).logits[0, -1].softmax(-1)
    assert float((frequencies - expected).abs().max()) < 5 * math.sqrt(0.25 / 4000)
    with isolated(0, "sample"):
        once = model.generate(prompt, max_new_tokens=9, do_sample=True)
    with isolated(0, "sample"):
        assert torch.equal(model.generate(prompt, max_new_tokens=9, do_sample=True, use_cache=False), once)


def test_generation_stops_at_the_end_token_and_pads() -> None:
    model, prompt = language_model(), texts(2, 5)
    free = model.generate(prompt, max_new_tokens=8, do_sample=False)
    end = int(free[0, 7])
    first = 5 + free[0, 5:].tolist().index(end)
    stopped = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=end)
    assert torch.equal(stopped[0, : first + 1], free[0, : first + 1])
    assert set(stopped[0, first + 1 :].tolist()) <= {PAD}


def test_the_loss_is_that_of_each_next_token() -> None:
    model, tokens = language_model(), texts(2, 9)
    expected = -model.log_probs(tokens)
    output = model(tokens, labels=tokens)
    rows = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in tokens]
    torch.testing.assert_close(output.loss, torch.stack(rows).mean())
    labels = tokens.clone()
    labels[:, :4] = -100
    partial = [F.cross_entropy(model(row[None]).logits[0, 3:-1], row[4:]) for row in tokens]
    torch.testing.assert_close(model(tokens, labels=labels).loss, torch.stack(partial).mean())
    assert expected.shape == (2, 10, VOCAB)


def test_the_loss_of_a_padded_batch_ignores_padding() -> None:
    model = language_model()
    rows = [texts(1, length, seed=length)[0] for length in (9, 4)]
    tokens, mask = left_padded(rows)
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows]
    torch.testing.assert_close(model(tokens, attention_mask=mask, labels=tokens).loss, sum(losses) / 11)


def test_accumulated_losses_add_up_to_that_of_the_whole_batch() -> None:
    """As Trainer asks for them: each part's sum over the number of labels in all parts."""
    model, tokens = language_model(), texts(3, 6)
    labels = tokens.clone()
    labels[0, :4] = -100
    n_items = (labels[:, 1:] != -100).sum()
    parts = [model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=n_items).loss for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), model(tokens, labels=labels).loss)
    assert model.accepts_loss_kwargs


def test_positions_are_ignored() -> None:
    model, tokens = language_model(), texts(2, 5)
    given = {"position_ids": torch.zeros(2, 5, dtype=torch.int64), "cache_position": torch.arange(5)}
    assert torch.equal(model(tokens, **given).logits, model(tokens).logits)
    assert torch.equal(model.model(tokens, **given).last_hidden_state, model.model(tokens).last_hidden_state)


def test_gradients_reach_every_weight_and_skip_padding() -> None:
    model = language_model("hawk").requires_grad_(True).train()
    tokens, mask = left_padded([texts(1, 9)[0], texts(1, 4)[0]])
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_prior_is_the_prediction_after_bos() -> None:
    model, tokens = language_model(), texts(2, 5)
    found = model.log_probs(tokens)
    started = torch.cat([torch.zeros(2, 1, dtype=torch.int64), tokens], 1)
    torch.testing.assert_close(found, model(started).logits.log_softmax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.log_probs(tokens[:, :0]), found[:, :1], rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="bos_token_id = None: expected the token the prior follows"):
        language_model(bos_token_id=None).log_probs(tokens)


def test_logits_to_keep_and_vectors_as_input() -> None:
    model, tokens = language_model(), texts(2, 6)
    whole = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    vectors = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=vectors).logits, whole)
    generated = model.generate(inputs_embeds=vectors, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=4, do_sample=False)[:, 6:])
    assert float(whole.abs().max()) < 30.0
    assert isinstance(model(tokens, return_dict=False), tuple)


def test_hidden_states_are_each_blocks_input_and_the_last_output() -> None:
    model, (tokens, mask) = language_model("hawk"), left_padded([texts(1, 6)[0], texts(1, 3)[0]])
    stack = model.model.stack
    hidden = model(tokens[1:], attention_mask=mask[1:], output_hidden_states=True).hidden_states
    embedded = stack.embed(tokens[1:, 3:])
    first, _ = stack.blocks[0](embedded, None, None)
    expected = (embedded, first, stack.hidden(embedded)[0])
    assert len(hidden) == 3
    for found, vectors in zip(hidden, expected, strict=True):
        torch.testing.assert_close(found[:, 3:], vectors, rtol=0, atol=1e-10)
    together = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    whole = model(tokens[:1], output_hidden_states=True).hidden_states
    cache = model(tokens[:1, :5], use_cache=True).past_key_values
    step = model(tokens[:1, 5:], past_key_values=cache, output_hidden_states=True).hidden_states
    for found, padded, vectors, last in zip(hidden, together, whole, step, strict=True):
        torch.testing.assert_close(padded[1:], found, rtol=0, atol=1e-10)
        torch.testing.assert_close(padded[:1], vectors, rtol=0, atol=1e-10)
        torch.testing.assert_close(last, vectors[:, 5:], rtol=0, atol=1e-10)
    assert model(tokens).hidden_states is None
    with pytest.raises(InputError, match="output_attentions = True: expected None or False"):
        model(tokens, output_attentions=True)


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bf16"])
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, hybrid: Literal["hawk"] | None, dtype: torch.dtype) -> None:
    model, tokens = language_model(hybrid, tie=hybrid is None).to(dtype), texts(2, 40)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = MesaNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert loaded.config.mesanet == model.config.mesanet
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())  # else other kernels, other bits
    assert exempted(loaded) == {"model.stack.embedding", *(name for name in before if name.endswith("lambda_params"))}
    backbone = MesaNetModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_auto_classes_in_a_fresh_process(tmp_path: Path) -> None:
    model, tokens = language_model("hawk"), texts(2, 6)
    model.save_pretrained(tmp_path)
    program = """
import json, sys, torch
import commissure.mesa.hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, tokens = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder)
vectors = AutoModel.from_pretrained(folder)(tokens).last_hidden_state
with torch.no_grad():
    logits, generated = model(tokens).logits, model.generate(tokens, max_new_tokens=3, do_sample=False)
size = AutoConfig.from_pretrained(folder).hidden_size
print(json.dumps([type(model).__name__, size, vectors.shape[-1], logits.tolist(), generated.tolist()]))
"""
    command = [sys.executable, "-c", program, str(tmp_path), json.dumps(tokens.tolist())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    name, hidden_size, width, logits, generated = json.loads(done.stdout)
    assert (name, hidden_size, width) == ("MesaNetForCausalLM", 16, 16)
    assert torch.equal(torch.tensor(logits, dtype=torch.float64), model(tokens).logits)
    assert generated == model.generate(tokens, max_new_tokens=3, do_sample=False).tolist()


def test_a_checkpoint_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    language_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.stack.blocks.1.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"blocks\.1\.norm\.weight"):
        MesaNetForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_vocabulary_can_be_resized(tmp_path: Path, tie: bool) -> None:
    model, tokens = language_model(tie=tie), texts(1, 6)
    before = model(tokens).logits
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert "model.stack.embedding" in exempted(model)
    after = model(torch.cat([tokens, torch.tensor([[VOCAB + 2]])], 1)).logits
    torch.testing.assert_close(after[:, :6, :VOCAB], before)
    assert after.shape[-1] == model.config.mesanet.vocab == VOCAB + 3
    model.save_pretrained(tmp_path)
    assert torch.equal(MesaNetForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_the_configuration_survives_with_hugging_face_names() -> None:
    shell = MesaNetPreTrainedConfig(**config().model_dump())
    assert (shell.hidden_size, shell.num_hidden_layers, shell.num_attention_heads) == (16, 2, 2)
    assert (shell.vocab_size, shell.tie_word_embeddings) == (VOCAB, False)
    assert shell.mesanet == config()
    assert MesaNetPreTrainedConfig(hidden_size=16, vocab_size=9).mesanet == MesaNetConfig(dim=16, vocab=9)
    with pytest.raises(InputError, match="dim = 0"):
        MesaNetPreTrainedConfig(hidden_size=0)
    shell.heads = 0
    with pytest.raises(InputError, match="heads = 0"):
        MesaNetForCausalLM(shell)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "input_ids, inputs_embeds = 'both or neither'"),
        ({"input_ids": torch.tensor([[VOCAB]])}, "tokens"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 2)}, "attention_mask"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "past_key_values": ()}, "past_key_values = 'tuple'"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": torch.zeros(1, 2, dtype=torch.int64)},
            r"labels = \(1, 2\): expected shape \(1, 3\)",
        ),
    ],
    ids=["nothing", "token", "short mask", "mask rows", "legacy cache", "labels"],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        language_model()(**options)


def test_what_states_cannot_do_is_refused() -> None:
    model, tokens = language_model(), texts(1, 4)
    with pytest.raises(InputError, match="states cannot be rolled back"):
        model(tokens, use_cache=True).past_key_values.crop(2)
    with pytest.raises(InputError, match="cache_implementation = 'static'"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens, max_new_tokens=2, assistant_model=model)


def test_without_transformers_the_pip_line_is_shown() -> None:
    program = """
import sys
sys.modules["transformers"] = None
import commissure.mesa
try:
    commissure.mesa.MesaNetForCausalLM
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert issubclass(BackendMissing, ImportError)
    assert done.stdout.strip() == (
        "BackendMissing MesaNetForCausalLM needs 'transformers'; install it with: pip install 'commissure[hf]'"
    )


def test_importing_the_organ_does_not_import_transformers() -> None:
    names = "MesaLayer, MesaNetConfig, inspect, set_test_time_compute, to_fla"
    program = f"import sys; from commissure.mesa import {names}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
