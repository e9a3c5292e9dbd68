# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The language model of the examples: checkpoints, decoding, training and the command."""

import dataclasses
import functools
import json
import os
import pathlib
import re

import checkpoint
import generate
import jax
import jax.numpy as jnp
import ml_dtypes
import model as lm
import numpy as np
import pytest
import safetensors.numpy
import tokenizer
import train_lm
from display import Display

import jax_attn

PAGE_SIZE = 4
CONFIG = lm.ModelConfig(
    vocab_size=checkpoint.BYTES_VOCAB_SIZE,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context=128,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_params(config, seed=0):
    """Larger than at the start of training, and norms that are not 1: every weight counts."""
    leaves, tree = jax.tree.flatten(lm.param_shapes(config))
    rng = np.random.default_rng(seed)
    draw = [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(tree, draw)
    return jax.tree.map_with_path(lambda path, p: jnp.asarray(p + lm.is_norm(path)), params)


@functools.partial(jax.jit, static_argnames="config")
def decode_logits(params, config, tokens, cache, page_table, kv_lengths, rope):
    hidden, cache = lm.decode(params, config, tokens, cache, page_table, kv_lengths, rope)
    return lm.unembed(params, config, hidden), cache


def new_cache(config, num_pages):
    return jax_attn.PagedKVCache.zeros(
        num_pages,
        PAGE_SIZE,
        config.num_kv_heads,
        config.head_dim,
        num_layers=config.num_layers,
        dtype=jnp.float32,
    )


def prefill_logits(config, params, prompts):
    """Returns the logits of each token of prompts that are run as one left-padded batch."""
    longest = max(map(len, prompts))
    max_pages = -(-longest // PAGE_SIZE)
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    pages = np.random.default_rng(1).permutation(len(prompts) * max_pages).astype(np.int32)
    logits, _ = decode_logits(
        params,
        config,
        tokens,
        new_cache(config, pages.size),
        pages.reshape(len(prompts), max_pages),
        np.array([len(prompt) for prompt in prompts], np.int32),
        lm.make_rope(config, longest),
    )
    return [row[longest - len(prompt) :] for row, prompt in zip(logits, prompts, strict=True)]


def stepwise_logits(config, params, tokens):
    """Returns the logits of each token, decoded one after the other."""
    max_pages = -(-len(tokens) // PAGE_SIZE)
    page_table = np.arange(max_pages, dtype=np.int32)[None, ::-1]
    cache, rope = new_cache(config, max_pages), lm.make_rope(config, len(tokens))
    rows = []
    for i, token in enumerate(tokens, 1):
        new, length = np.array([[token]], np.int32), np.array([i], np.int32)
        logits, cache = decode_logits(params, config, new, cache, page_table, length, rope)
        rows.append(logits[0, 0])
    return np.stack(rows)


def assert_close(actual, expected, tolerance=1e-4):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def tokens_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).astype(np.int32)


# Against PyTorch.


@pytest.mark.filterwarnings("ignore")  # of others' packages
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
        ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
        ("Llama", {"num_key_value_heads": 8, "rope_parameters": YARN}),
        ("Llama", {"rope_parameters": LINEAR}),
    ],
)
def test_logits_are_those_of_transformers(architecture, options, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    values = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**(values | options))
    theirs = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(mean=float(name.endswith("norm.weight")), std=0.2)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = np.random.default_rng(0).integers(0, 100, 45).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens[None]).long()).logits[0].numpy()

    ours, params = checkpoint.load(tmp_path)
    assert_close(prefill_logits(ours, params, [tokens])[0], expected)
    if ours.rope_type in ("default", "llama3"):  # The others differ in the tables only.
        assert_close(stepwise_logits(ours, params, tokens), expected)


# The model.


def test_prefill_and_decoding_agree_with_the_plain_forward():
    """Also says that a prompt does not depend on the rest of its batch, or on its padding."""
    params = random_params(CONFIG)
    prompts = [tokens_of(length, seed=length) for length in (1, 4, 5, 23, 3)]
    padded = np.stack([np.append(p, np.zeros(23 - len(p), np.int32)) for p in prompts])
    expected = lm.train_logits(params, CONFIG, padded)
    for i, logits in enumerate(prefill_logits(CONFIG, params, prompts)):
        assert_close(logits, expected[i, : len(logits)])
    assert_close(stepwise_logits(CONFIG, params, prompts[3]), expected[3])


def test_decoding_copies_no_cache():
    params = random_params(CONFIG)
    cache = new_cache(CONFIG, 5000)
    model = generate.Model(params, lm.make_rope(CONFIG, 64))
    compiled = generate.decode_chunk.lower(
        model,
        np.zeros(2, np.int32),
        cache,
        np.zeros((2, 4), np.int32),
        np.ones(2, np.int32),
        jax.random.key(0),
        options=generate.Options(CONFIG, implementation="xla", qkv_implementation="xla"),
    ).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k_pages.nbytes + cache.v_pages.nbytes
    assert memory.temp_size_in_bytes < cache.k_pages.nbytes


# Checkpoints.


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture
def byte_model(tmp_path):
    checkpoint.save(tmp_path, CONFIG, random_params(CONFIG))
    return tmp_path


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, qk_norm, tied):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm, tied_embeddings=tied)
    params = random_params(config)
    checkpoint.save(tmp_path / "new", config, params)
    loaded_config, loaded = checkpoint.load(tmp_path / "new")
    assert loaded_config == config
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtypes_are_converted(byte_model, stored, dtype):
    edit_tensors(byte_model, lambda t: t.update({n: a.astype(stored) for n, a in t.items()}))
    _, params = checkpoint.load(byte_model, dtype)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    _, exact = checkpoint.load(byte_model)
    jax.tree.map(lambda p, e: np.testing.assert_array_equal(p, e.astype(dtype)), params, exact)


def shard(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
        safetensors.numpy.save_file(part, folder / f"part-{i}.safetensors")
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_checkpoint(byte_model):
    _, whole = checkpoint.load(byte_model)
    shard(byte_model)
    _, sharded = checkpoint.load(byte_model)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


def test_missing_files(byte_model):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json is missing"):
        checkpoint.load(pathlib.Path("nowhere"))
    shard(byte_model)
    (byte_model / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1.safetensors is missing; .*index.json"):
        checkpoint.load(byte_model)
    (byte_model / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing, and so is"):
        checkpoint.load(byte_model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; .* Qwen3For"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type dynamic is not .* yarn"),
        ({"num_hidden_layers": 3}, r"tensor model.layers.2.* is missing"),
        ({"num_hidden_layers": 1}, r"11 tensors, such as model.layers.1.* have no place"),
        ({"intermediate_size": 40}, r"has shape \(32, 48\), but config.json asks for \(32, 40\)"),
    ],
)
def test_models_that_are_refused(byte_model, changes, message):
    edit_config(byte_model, **changes)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(byte_model)


def test_config_without_a_size_is_refused(byte_model):
    (byte_model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match=r"'num_attention_heads' is missing"):
        checkpoint.load(byte_model)


def test_quantised_tensor_is_refused(byte_model):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(byte_model, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=rf"{name} has dtype I8; supported are F32, BF16, F16"):
        checkpoint.load(byte_model)


def test_tokenizer_file(byte_model):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(byte_model / "tokenizer.json"))
    edit_config(byte_model, eos_token_id=[1, 2])
    loaded = tokenizer.load(byte_model, CONFIG)
    assert loaded.encode("b a") == [1, 0]
    assert loaded.decode([0, 0]) == "a a"
    assert loaded.end_tokens == {1, 2}


def test_only_bytes_need_no_tokenizer_file(byte_model):
    words = tokenizer.load(byte_model, CONFIG)
    assert words.encode("é") == [256, 0xC3, 0xA9]
    assert words.decode([256, 0xC3, 0xA9, 0xC3]) == "é\ufffd"
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing; only a vocabulary"):
        tokenizer.load(byte_model, dataclasses.replace(CONFIG, vocab_size=999))


# The command.


def test_command(byte_model, capsys):
    prompts = ["x = 1", "def f(a):\n    return", ""]
    arguments = ["--tokens", "20", "--temperature", "0.8"]
    assert generate.main(["--model", str(byte_model), "--prompt", *prompts, *arguments]) == 0
    out = capsys.readouterr().out
    assert all(prompt in out for prompt in prompts)
    assert "both chose the same tokens" in out
    assert re.search(r"saves -?[0-9]+ us per token: [0-9]+ us with it and [0-9]+ us without", out)


def test_single_text_is_appended_to_by_whole_characters(capsys):
    with Display(["caf"], 4) as display:
        capsys.readouterr()
        shown = []
        for count, text in enumerate(["\ufffd", "é", "é\x1b", "é\x1b!\ufffd"], 1):
            display.update([text], count)
            shown.append(capsys.readouterr().out)
    assert shown == ["", "é", "\ufffd", "!"]  # Control characters are not sent to a terminal.
    assert capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize("length", [3, 900])
def test_screen_shows_the_ends_of_all_texts(length, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 12)))
    with Display(["first", "second"], 4) as display:
        capsys.readouterr()
        display.update(["a\tb\n" * length + "end one", "c" * length + "end two"], 4)
        screen = capsys.readouterr().out
    assert screen.count("\n") < 12
    assert "end one" in screen
    assert "end two" in screen
    assert max(map(len, screen.removeprefix("\x1b[H\x1b[2J").split("\n"))) <= 40
    assert "first" + "a\tb\n" * length + "end one\n" in capsys.readouterr().out


def test_generated_tokens_are_the_best_ones():
    """Chunks, growing page tables and padding give what a plain forward over all of it does."""
    params = random_params(CONFIG)
    model = generate.Model(params, lm.make_rope(CONFIG, CONFIG.context))
    prompts = [tokens_of(length, seed=length).tolist() for length in (3, 18)]
    run = generate.generate(model, generate.Options(CONFIG), prompts, 36)
    assert run.tokens.shape == (2, 36)
    texts = [[*p, *new] for p, new in zip(prompts, run.tokens.tolist(), strict=True)]
    padded = np.array([text + [0] * (54 - len(text)) for text in texts], np.int32)
    best = np.argmax(lm.train_logits(params, CONFIG, padded), axis=-1)
    for i, prompt in enumerate(prompts):
        start = len(prompt) - 1
        np.testing.assert_array_equal(best[i, start : start + 36], run.tokens[i])

    ends = frozenset(run.tokens[:, 5].tolist())
    short = generate.generate(model, generate.Options(CONFIG), prompts, 36, end_tokens=ends)
    np.testing.assert_array_equal(short.tokens, run.tokens[:, :17])


def test_samples_follow_the_softmax_and_the_seed():
    logits = jnp.broadcast_to(jnp.array([[1.0, 0.0, 2.0, -1.0]]), (4000, 4))
    lengths = jnp.full(4000, 7, jnp.int32)

    def sample(seed, length):
        tokens, margins = generate.choose(logits, jax.random.key(seed), lengths + length, 0.5)
        assert (margins >= 0).all()
        return np.asarray(tokens)

    tokens = sample(0, 0)
    frequencies = np.bincount(tokens, minlength=4) / 4000
    np.testing.assert_allclose(frequencies, jax.nn.softmax(logits[0] / 0.5), atol=0.03)
    np.testing.assert_array_equal(sample(0, 0), tokens)
    assert (sample(1, 0) != tokens).any()
    assert (sample(0, 1) != tokens).any()


def test_text_stops_before_its_end_token():
    assert generate.until_end([5, 6, 7, 6], frozenset({7, 6})) == [5]
    assert generate.until_end([5, 6], frozenset()) == [5, 6]


def test_disagreement_gives_exit_status_1(byte_model, monkeypatch, capsys):
    def run(model, options, prompts, num_tokens, **_):
        tokens = np.arange(num_tokens)[None] + (options.implementation == "xla")
        return generate.Generated(tokens, np.ones(tokens.shape), num_tokens - 1, 1.0, 1.0)

    monkeypatch.setattr(generate, "generate", run)
    assert generate.main(["--model", str(byte_model), "--prompt", "a", "--tokens", "5"]) == 1
    assert "different tokens: sequence 1, token 1: 0 and 1" in capsys.readouterr().err


def test_ties_are_no_disagreement():
    a = generate.Generated(np.array([[1, 2, 3]]), np.array([[1.0, 1e-5, 1.0]]), 2, 0.0, 0.0)
    b = dataclasses.replace(a, tokens=np.array([[1, 9, 9]]))
    assert generate.first_disagreement(a, b, 1e-3) is None
    assert "token 2: 2 and 9" in generate.first_disagreement(a, b, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be positive"),
        (["--tokens", "200"], "do not fit the model's context of 128"),
        (["--model", "nowhere"], "nowhere/config.json is missing"),
    ],
)
def test_bad_arguments(byte_model, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--model", str(byte_model), *arguments])
    assert message in capsys.readouterr().err


# Training.


def test_training_learns_and_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lm, "CONFIG", dataclasses.replace(CONFIG, num_layers=1))
    text = np.frombuffer(b"def f(x):\n    return x\n\n" * 200, np.uint8)
    monkeypatch.setattr(train_lm, "read_sources", lambda: (text, text[:512]))
    arguments = f"train_lm.py --steps 50 --batch 4 --context 64 --lr 0.01 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", arguments.split())
    with jax.numpy_dtype_promotion("standard"):  # `jax.nn.dot_product_attention` needs it.
        train_lm.main()
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["validation_loss"] < 1.5 < np.log(256)
    assert checkpoint.read_config(tmp_path).context == 64


def test_sources_are_split():
    train, held_out = train_lm.read_sources()
    assert train.size > 20 * held_out.size > 0


def test_model_that_comes_with_the_example(capsys):
    if not generate.DEFAULT_MODEL.exists():
        pytest.skip("examples/model is not in this checkout")
    assert generate.main(["--tokens", "40"]) == 0
    assert "both chose the same tokens" in capsys.readouterr().out
