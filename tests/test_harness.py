"""Properties of nanodmc/harness.py: lm_eval's own model of the same weights says the same."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TEXTS, oracle
from dmc import Cache, Transformer
from nanodmc import benchmarks, checkpoint, harness
from nanodmc.files import InputError
from nanodmc.policies import policy_cache
from nanodmc.requests import Request
from nanodmc.tokenizer import Tokenizer
from test_dmc import config_of

pytestmark = pytest.mark.usefixtures("one_thread")

STOPS = ["\n", "e t"]


def request(*arguments, task="task"):
    return SimpleNamespace(args=arguments, task_name=task)


def small(seed=0, **changes):
    """A small model over bytes, in fp32."""
    torch.manual_seed(seed)
    return Transformer(config_of((4, 2), vocab_size=257, **changes))


def theirs_of(folder, end="<|endoftext|>"):
    """lm_eval's own model of the checkpoint in a folder, in fp32."""
    transformers, _ = oracle("transformers"), oracle("lm_eval")
    oracle("accelerate"), oracle("peft")
    from lm_eval.models.huggingface import HFLM
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=end, eos_token=end, pad_token=end)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                              trust_remote_code=True)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=8, device="cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "DMC"])
def pair(tmp_path_factory, request):
    """The same small model, ours and lm_eval's; half of the tokens of a DMC model merge."""
    oracle("lm_eval")
    folder, model = tmp_path_factory.mktemp("harness"), small(dmc=request.param, c=0.0)
    checkpoint.save(model, folder, Tokenizer.bytes())
    with benchmarks.quiet():
        return harness.adapter(model, Tokenizer.from_folder(folder)), theirs_of(folder)


WORDS = st.one_of(TEXTS, st.sampled_from(["a ", " a", "  ", "", "yes", "the end  "]))


@given(st.lists(st.tuples(WORDS, WORDS.filter(lambda text: text.strip())), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_log_likelihoods_equal_lm_evals_own(pair, pairs):
    """Contexts that are empty, end in blanks, or are longer than the model's positions."""
    limit = 64                                # of both: the positions of the model
    pairs = [(a.encode(errors="replace").decode(), b.encode(errors="replace").decode()[:9])
             for a, b in pairs]
    pairs = [(a, b) for a, b in pairs if len(b.encode()) < limit and a.strip() + b.strip()]
    pairs = [(a, b) for a, b in pairs if a == "" or a.strip()]
    requests = [request(a, b) for a, b in pairs if len((a[len(a.rstrip()):] + b).encode()) < limit]
    ours, theirs = pair
    with benchmarks.quiet():
        expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]


def part_of(name):
    return {"Sequence": {"id": name, "type_id": 0}}


def test_what_a_template_puts_before_a_text_stands_there_once(pair, tmp_path, monkeypatch):
    """As in lm_eval's own model: also before a context, and not where a text begins with it."""
    end = "<|endoftext|>"
    facts = json.loads(Tokenizer.bytes().files["tokenizer.json"])
    special = {end: {"id": end, "ids": [256], "tokens": [end]}}
    facts["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": special,
        "single": [{"SpecialToken": {"id": end, "type_id": 0}}, part_of("A")],
        "pair": [part_of("A"), part_of("B")]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    (tmp_path / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": 256}')
    _, theirs = pair
    monkeypatch.setattr(theirs, "tokenizer", oracle("transformers").PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=end, eos_token=end))
    ours = harness.adapter(small(), Tokenizer.from_folder(tmp_path))
    assert ours.tok_encode("a") == [256, 97] and ours.prefix_token_id == theirs.prefix_token_id
    for text in ("a", "a b ", end + "a", "a" + end, ""):
        for add in (None, False, True):
            assert ours.tok_encode(text, add) == theirs.tok_encode(text, add)


def test_rolling_log_likelihoods_equal_lm_evals_own(pair, monkeypatch):
    """Window by window: in a batch, lm_eval 0.4.13 scores a last window unlike alone."""
    texts = [request("x"), request("the quick brown fox " * 20), request("a" * 64)]
    ours, theirs = pair
    monkeypatch.setattr(theirs, "batch_size_per_gpu", 1)
    with benchmarks.quiet():
        expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)


def test_generated_text_equals_lm_evals_own(pair):
    contexts = ["def f(x):", "The ", "".join(map(chr, range(33, 127))), "x"]
    settings = {"until": STOPS, "max_gen_toks": 12}
    ours, theirs = pair
    with benchmarks.quiet():
        requests = [SimpleNamespace(args=(context, {**settings, "do_sample": False}),
                                    task_name="task") for context in contexts]
        expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected and any(expected)


@pytest.mark.parametrize("dmc", [False, True])
def test_generated_text_stops_where_it_is_told_and_holds_what_its_cache_held(dmc):
    """Sampled, in one batch and through a cache each: the same text, tokens and slots."""
    model, tokenizer = small(dmc=dmc, c=0.0), Tokenizer.bytes()
    asked = [Request(list(text.encode()), 30, temperature=5.0, top_p=0.9, seed=i, key=i)
             for i, text in enumerate(["a", "some text", "bc" * 9])]
    stops, told = {0: ["\n"], 1: ["x"], 2: []}, []
    arguments = model, tokenizer, asked, stops, None

    def report(*progress):
        told.append(progress)
    batch = harness.together(*arguments, None, report)
    alone = harness.one_by_one(*arguments, lambda length: Cache, report)
    for key, stop in stops.items():
        ids = batch[key][0]
        assert harness.cut(bytes(ids), stop) == harness.cut(bytes(alone[key][0]), stop)
        if ids == alone[key][0] and len(ids) == 30:                      # it ended by its length
            assert batch[key][1:] == alone[key][1:]
        assert 1 <= batch[key][1] / batch[key][2] and (dmc or batch[key][1] == batch[key][2])
    assert told[-1] == (harness.GENERATED, 90, 90) and all(done <= 90 for _, done, _ in told)


def test_a_policy_that_keeps_everything_changes_nothing():
    oracle("lm_eval")
    model, tokenizer = small(dmc=False), Tokenizer.bytes()
    pairs = [request("some context", " and more"), request("", "abc"), request("b", "c")]
    texts = [request("some", {"until": ["\n"], "max_gen_toks": 9})]
    plain = harness.adapter(model, tokenizer)
    everything = harness.adapter(model, tokenizer, cache_for=lambda n: policy_cache("h2o", n))
    half = harness.adapter(model, tokenizer, cache_for=lambda n: policy_cache("h2o", -(-n // 2)))
    for one, other in zip(*(lm.loglikelihood(pairs) for lm in (plain, everything)), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert plain.generate_until(texts) == everything.generate_until(texts)
    assert plain.held == everything.held
    half.loglikelihood(pairs)
    tokens, slots = half.held["task"]
    assert tokens == 4 * (12 + 8 + 3 + 1) and slots == 4 * (10 + 2 + 1)


def test_greedy_is_the_default_and_unknown_settings_are_refused():
    assert harness.read_settings({}, 1000) == ([], 256, {"temperature": 0.0})
    assert harness.read_settings({"until": "x", "max_gen_toks": 99, "temperature": 0.0}, 50) == (
        ["x"], 49, {"temperature": 0.0})
    assert harness.read_settings({"do_sample": True, "temperature": 0.1, "top_p": 0.95}, 9)[2] == {
        "temperature": 0.1, "top_k": 0, "top_p": 0.95}
    with pytest.raises(InputError, match="num_beams"):
        harness.read_settings({"num_beams": 4}, 9)


@given(st.lists(st.sampled_from("abc\nd"), max_size=30).map("".join),
       st.lists(st.text("abc\nd", min_size=1, max_size=4), max_size=3))
@settings(max_examples=100)
def test_a_text_has_ended_as_soon_as_a_stop_is_in_it(text, stops):
    tokenizer, ids = Tokenizer.bytes(), list(text.encode())
    first = next((n for n in range(len(ids) + 1) if harness.ended(tokenizer, ids[:n], stops)), None)
    expected = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    assert first == expected
    assert harness.cut(text.encode(), stops) == text[:min(
        (text.find(stop) for stop in stops if stop in text), default=None)]


def test_a_tokenizer_without_a_beginning_or_an_end_is_refused():
    tokenizer = Tokenizer.bytes()
    tokenizer.special_ids, tokenizer.prefix, tokenizer.eos = {}, [], None
    with pytest.raises(InputError, match="bos_token_id"):
        harness.opening(tokenizer)


ITEMS = {"piqa": 50, "arc_easy": 50, "boolq": 12, "hellaswag": 12}


@pytest.fixture(scope="session")
def evals(tmp_path_factory):
    """The task files of the folder that DMC_EVALS names, in another one."""
    if not (folder := os.environ.get("DMC_EVALS")):
        pytest.skip("DMC_EVALS names no folder of task files as shared/tools/make_evals.py "
                    "writes them")
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("evals"), dirs_exist_ok=True)
    with (copy / "boolq_local.yaml").open("a") as file:
        file.write("\ndoc_to_target: answer\n")      # as its data has it; super_glue's has a label
    return copy


@pytest.mark.parametrize("name", ITEMS)
def test_smollm2_scores_equal_lm_evals_own(smollm2, smollm2_pair, evals, name):
    """Item by item, as lm_eval asks them."""
    ours = harness.adapter(smollm2_pair[0], Tokenizer.from_folder(smollm2))
    theirs, samples = theirs_of(smollm2), []
    tasks = benchmarks.load_tasks(name, evals)
    for lm in (ours, theirs):
        results = benchmarks.evaluate(lm, tasks, ITEMS[name], samples=True)
        samples.append([one["filtered_resps"] for one in results["samples"][f"{name}_local"]])
    assert len(samples[0]) == ITEMS[name]
    for our_choices, their_choices in zip(*samples, strict=True):
        for one, other in zip(our_choices, their_choices, strict=True):
            assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]
