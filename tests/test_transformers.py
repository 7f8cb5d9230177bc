"""Hugging Face's transformers opens our checkpoints and says what we say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dmc
from conftest import oracle
from dmc import Transformer
from nanodmc.checkpoint import load, save
from nanodmc.sampling import chooser, generate
from nanodmc.tokenizer import Tokenizer
from nanodmc.variants import VariantConfig
from test_dmc import config_of, model_of

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["import os", "def f(x):\n    return", "x"]


@pytest.fixture(scope="module", params=["a window", "rope", "tied"])
def folder(tmp_path_factory, request):
    """A checkpoint whose decisions vary, in fp32."""
    changes = {"a window": {"window": 5}, "tied": {"window": None, "tie_embeddings": True},
               "rope": {"rope_theta": 500.0, "control_pair": 2,
                        "rope_scaling": {"rope_type": "linear", "factor": 2.0}}}
    model = model_of(3, (4, 2), vocab_size=257, max_seq_len=128, c=0.0, **changes[request.param])
    path = tmp_path_factory.mktemp("ours")
    save(model.float(), path, Tokenizer.bytes(), target_cr=2.0)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = oracle("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def ids_of(*texts):
    """The texts' ids with padding on the left, and the mask."""
    rows = [[256, *text.encode()] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def cache_of(output):
    """What this version of transformers calls the cache."""
    return "cache" if "cache" in output else "past_key_values"


def continued(folder, text, count):
    """What generate.py continues a text with, greedily, and the CR of its cache."""
    model = load(folder)
    cache = model.new_cache(1)
    prompt = [256, *text.encode()]
    choose = chooser(temperature=0.0, top_k=0, top_p=1.0, seed=0)
    return list(generate(model, cache, prompt, count, choose)), cache.compression_ratio


def test_a_batch_with_padding_says_what_generate_says(folder, theirs):
    ids, mask = ids_of(*PROMPTS)
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False,
                          pad_token_id=0, return_dict_in_generate=True, eos_token_id=None)
    for row, text in zip(out.sequences, PROMPTS, strict=True):
        assert row[ids.size(1):].tolist() == continued(folder, text, 20)[0]
    alone, _ = ids_of(PROMPTS[1])
    out = theirs.generate(alone, max_new_tokens=20, do_sample=False, pad_token_id=0,
                          return_dict_in_generate=True, eos_token_id=None)
    memory = out[cache_of(out)]
    ratio = continued(folder, PROMPTS[1], 20)[1]
    assert memory.compression_ratio == pytest.approx(ratio) and ratio > 1.2


def test_a_cache_goes_on(folder, theirs):
    ids, _ = ids_of(PROMPTS[0])
    flags = dict(do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True)
    first = theirs.generate(ids, max_new_tokens=5, **flags)
    name = cache_of(first)
    second = theirs.generate(first.sequences, max_new_tokens=5, **{name: first[name]}, **flags)
    whole = theirs.generate(ids, max_new_tokens=10, **flags)
    assert second.sequences.tolist() == whole.sequences.tolist()


def test_sampling_and_streaming(theirs, folder):
    transformers = oracle("transformers")
    ids, mask = ids_of(*PROMPTS)
    flags = dict(do_sample=True, top_p=0.9, temperature=0.8, max_new_tokens=12, pad_token_id=0)
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(theirs.generate(ids, attention_mask=mask, **flags).tolist())
    assert texts[0] == texts[1] and all(len(set(row[-12:])) > 2 for row in texts[0])

    class Streamed(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append("end")

    streamer, (alone, _) = Streamed(), ids_of(PROMPTS[0])
    out = theirs.generate(alone, streamer=streamer, max_new_tokens=8, do_sample=False,
                          pad_token_id=0, eos_token_id=None)
    assert streamer.ids == [*out[0].tolist(), "end"]


def test_logits_and_loss_are_ours(folder, theirs):
    """Without a cache by the training form, with one by Algorithm 1; padding on either side."""
    model, (ids, mask) = load(folder), ids_of(*PROMPTS)
    for use_cache in (False, True):
        with torch.no_grad():
            out = theirs(ids, attention_mask=mask, use_cache=use_cache)
            right = theirs(ids.flip(1), attention_mask=mask.flip(1), use_cache=use_cache)
        for i, n in enumerate(mask.sum(1).tolist()):
            ours = model(ids[i:i + 1, -n:])[0][0]
            assert torch.allclose(out.logits[i, -n:], ours, atol=2e-4)
            ours = model(ids.flip(1)[i:i + 1, :n])[0][0]
            assert torch.allclose(right.logits[i, :n], ours, atol=2e-4)
    labels = ids.masked_fill(mask == 0, -100)
    loss = theirs(ids, attention_mask=mask, labels=labels).loss
    wanted = [F.cross_entropy(model(row[None, -n:])[0][0, :-1], row[-n + 1:], reduction="sum")
              for row, n in zip(ids, mask.sum(1), strict=True)]
    # the first token of a padded row is predicted too, from padding: labels say so, as they do
    # everywhere in transformers, unless there is no padding
    widest = mask.sum(1).argmax()
    alone = theirs(ids[widest:widest + 1], labels=ids[widest:widest + 1]).loss
    assert alone.item() == pytest.approx(wanted[widest].item() / (ids.size(1) - 1), rel=1e-4)
    assert loss.isfinite()
    kept = theirs(ids[widest:widest + 1], logits_to_keep=1).logits
    assert kept.shape == (1, 1, 257)


def test_it_saves_itself_and_we_open_that(theirs, folder, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = load(tmp_path)
    ours = load(folder).state_dict()
    assert all(torch.equal(w, ours[name]) for name, w in again.state_dict().items())
    assert again.config == load(folder).config


def test_the_tokenizer_comes_along(folder):
    transformers = oracle("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("import os", add_special_tokens=False)["input_ids"] == list(b"import os")


def test_a_plain_llama_stays_one(tmp_path):
    transformers = oracle("transformers")
    model = model_of(1, (4, 2), dmc=False, vocab_size=257).float()
    save(model, tmp_path, Tokenizer.bytes())
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (
        tmp_path / "config.json").read_text()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.LlamaForCausalLM
    ids, _ = ids_of("plain")
    assert torch.allclose(theirs(ids).logits, model(ids)[0], atol=1e-4)


def test_what_does_not_work_is_said(theirs, tmp_path):
    transformers = oracle("transformers")
    ids, mask = ids_of(*PROMPTS)
    with pytest.raises(ValueError, match="num_beams"):
        theirs.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=4, pad_token_id=0)
    with pytest.raises(ValueError, match="holes"):
        theirs(ids[:1, :3], attention_mask=torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match="a token in every row"):
        theirs(ids[:1, :3], attention_mask=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="inputs_embeds"):
        theirs(ids, inputs_embeds=torch.zeros(1))
    with pytest.raises(ValueError, match="128 positions"):
        theirs(torch.zeros(1, 129, dtype=torch.long))
    config = VariantConfig(**vars(config_of()), variant="uniform")
    save(Transformer(config), tmp_path, Tokenizer.bytes())
    with pytest.raises(ValueError, match=r"variant uniform.*generate\.py"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_dmc_travels_unchanged(folder):
    assert (folder / "dmc.py").read_bytes() == Path(dmc.__file__).read_bytes()
    facts = json.loads((folder / "config.json").read_text())
    assert facts["auto_map"]["AutoModelForCausalLM"].startswith("modeling_dmc.")
    assert replace(load(folder).config, dmc=True) == load(folder).config
