"""Served by vLLM on a CPU: the base model's texts, and exactly the drafts of the slow loop. `make test-vllm`."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_sampling import p_value
from tiny_models import VOCAB, character_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.drafters import turned
from modeling_speculator.modeling_residual import ResidualConfig, ResidualSpeculator
from modeling_speculator.trainers import SpeculatorTrainer, SpeculatorTrainingArguments


pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm` makes an environment that has it")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICKSTART = ROOT / "outputs/quickstart"
GREEDY = {"temperature": 0, "max_tokens": 24}
CHAIN = {"top_k_tokens_per_head": [1, 1, 1], "n_candidates": 1}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random base model, of heads that vLLM has on CPUs, a speculator for it, their folder, texts to train on."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **sizes, **special)).eval()
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3 if "embed" in name or "head" in name else 0.15)
    prompts = torch.randint(1, VOCAB, (64, 8), generator=torch.Generator().manual_seed(1))
    text = base.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=56, do_sample=False)
    base.save_pretrained(folder / "base")
    character_tokenizer(eos_token="a", pad_token="a").save_pretrained(folder / "base")
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=64, inner_dim=48)
    speculator = trained(base, MLPSpeculatorPreTrainedModel(config), text.tolist(), folder)
    return base, speculator, folder, text.tolist()


def trained(base, speculator, texts, folder):
    """A speculator that has learned texts, saved as `speculator` in a folder."""
    args = SpeculatorTrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=200,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    SpeculatorTrainer(speculator, base, args, train_dataset=Dataset.from_dict({"input_ids": texts})).train()
    speculator.eval().save_pretrained(folder / "speculator")
    return speculator


@pytest.fixture(scope="module")
def prompts(pair):
    """Eight of unequal lengths, beginnings of texts that the speculator was trained on, but for the shortest."""
    lengths = (8, 12, 9, 31, 17, 10, 25)
    return [text[:length] for text, length in zip(pair[3], lengths, strict=False)] + [[5]]


def slowly(pair, prompts, n_heads=3):
    """Texts by our loop, one by one, with the chains that vLLM drafts; and their drafts.

    The last draft of a text counts whole, as vLLM counts it: some tokens more are generated, and cut off.
    """
    base, speculator, *_ = pair
    texts, drafts, accepted, wanted = [], 0, 0, GREEDY["max_tokens"]
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": wanted + n_heads, "return_dict_in_generate": True}
        with turned(speculator, CHAIN | {"n_heads": n_heads}):
            out = base.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), assistant_model=speculator, **options
            )
        texts.append([out.sequences[0, len(prompt) :][:wanted].tolist()])
        tokens = 1  # of the prefill
        for emitted in out.speculation.per_sequence[0].emitted_per_step:
            if tokens < wanted:
                drafts, accepted = drafts + 1, accepted + emitted - 1
            tokens += emitted
    return texts, drafts, accepted


def serve(pair, tmp_path, prompts, sampling, n=3, speculator=None, **engine):
    """Texts, and the counters of `/metrics`, as vLLM has them."""
    folder = pair[2]
    engine = {"model": str(folder / "base"), "skip_tokenizer_init": True, "max_num_batched_tokens": 256} | engine
    if n:
        engine["speculative_config"] = {
            "method": "mtp",
            "model": str(speculator or folder / "speculator"),
            "num_speculative_tokens": n,
        }
    asked = {"engine": engine, "prompts": prompts, "sampling": sampling}
    question, answer = tmp_path / "asked.json", tmp_path / "answer.json"
    question.write_text(json.dumps(asked))
    command = [sys.executable, str(HERE / "offline.py"), str(question), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(answer.read_text())
    counters = {
        name.removeprefix("vllm:spec_decode_num_"): value
        for name, value in answer["metrics"].items()
        if "spec_decode" in name and value is not None
    }
    return answer["texts"], counters


@pytest.mark.parametrize("n", [1, 2, 3])
def test_texts_and_drafts(pair, prompts, tmp_path, n):
    texts, drafts, accepted = slowly(pair, prompts, n)
    served, counters = serve(pair, tmp_path, prompts, [GREEDY] * len(prompts), n, max_num_seqs=8)
    assert served == texts
    assert accepted > 20
    assert counters == {"drafts": drafts, "draft_tokens": n * drafts, "accepted_tokens": accepted}


def test_the_form_that_is_bound_to_its_base_model(pair, prompts, tmp_path):
    """It reads and scores tokens by what vLLM has of that one."""
    base, _, folder, known = pair
    new = ResidualSpeculator(ResidualConfig(vocab_size=VOCAB, emb_dim=64))
    new.speculator.start_from(base)
    bound = trained(base, new, known, tmp_path)
    texts, drafts, accepted = slowly((base, bound, folder, known), prompts)
    served, counters = serve(
        pair, tmp_path, prompts, [GREEDY] * len(prompts), speculator=tmp_path / "speculator", max_num_seqs=8
    )
    assert served == texts
    assert accepted > 20
    assert counters == {"drafts": drafts, "draft_tokens": 3 * drafts, "accepted_tokens": accepted}


def test_chunked_prefill_and_the_prefix_cache(pair, prompts, tmp_path):
    """Prompts that are read in parts, and some twice."""
    texts, *_ = slowly(pair, prompts)
    chunks = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 32}
    served, counters = serve(pair, tmp_path, prompts * 2, [GREEDY] * 16, **chunks)
    assert served == texts * 2
    assert counters["accepted_tokens"] > 40


def test_sampled_texts_have_the_distribution(pair, prompts, tmp_path):
    """At temperature 1, of the 3 most probable tokens, beside a greedy row: texts of three tokens, by chi-square."""
    base, copies = pair[0], 200
    sampling = {"temperature": 1.0, "top_k": 3, "max_tokens": 3, "n": copies, "seed": 1}
    served, _ = serve(pair, tmp_path, prompts[:2], [sampling, GREEDY], max_num_seqs=128)
    assert served[1] == slowly(pair, prompts[1:2])[0][0]
    counts = Counter(tuple(text) for text in served[0])

    def after(text):
        scores, tokens = base(torch.tensor([prompts[0] + text])).logits[0, -1].topk(3)
        return dict(zip(tokens.tolist(), scores.softmax(-1).tolist(), strict=True))

    probabilities = {
        (one, two, three): p * q * r
        for one, p in after([]).items()
        for two, q in after([one]).items()
        for three, r in after([one, two]).items()
    }
    assert counts.keys() <= probabilities.keys()
    assert p_value(list(counts.elements()), probabilities) > 1e-3


def test_two_tensor_parallel_ranks(pair, prompts, tmp_path):
    texts, drafts, accepted = slowly(pair, prompts)
    served, counters = serve(pair, tmp_path, prompts, [GREEDY] * len(prompts), max_num_seqs=8, tensor_parallel_size=2)
    assert served == texts
    assert counters == {"drafts": drafts, "draft_tokens": 3 * drafts, "accepted_tokens": accepted}


# The server


@contextmanager
def server(log: Path, *options):
    """The OpenAI server, as a client meets it: its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "cpu_harness.py"), "vllm.entrypoints.openai.api_server", *options]
    command += ["--served-model-name", "base", "--port", str(port), "--enforce-eager", "--max-num-seqs", "8"]
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                assert process.poll() is None, log.read_text()[-4000:]
                with suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=10)
                    break
                time.sleep(1)
            yield url
        finally:
            process.terminate()


def complete(url: str, prompt) -> str:
    body = {"model": "base", "prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.loads(urllib.request.urlopen(request, timeout=300).read())["choices"][0]["text"]


def pair_of_tokens(request):
    pair, prompts = request.getfixturevalue("pair"), request.getfixturevalue("prompts")
    base = ["--model", str(pair[2] / "base"), "--dtype", "float32", "--max-model-len", "128"]
    model = {"method": "mtp", "model": str(pair[2] / "speculator"), "num_speculative_tokens": 3}
    return base, [*base, "--speculative-config", json.dumps(model)], prompts[:4]


def quickstarts(request):
    """Its pair by the recipe, beginnings of files that it was not trained on."""
    if not (QUICKSTART / "speculator/config.json").is_file():
        pytest.skip("needs the quickstart's models, which are not here: `make quickstart` trains them")
    base = ["--model", str(QUICKSTART / "base_model"), "--dtype", "float32", "--max-model-len", "256"]
    files = (QUICKSTART / "corpus/held_out.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["text"][:200] for line in files[:4]]
    return base, ["--config", str(ROOT / "recipes/serve/quickstart.yaml")], prompts


@pytest.mark.parametrize("what", [pair_of_tokens, quickstarts])
def test_two_clients_at_once(what, request, tmp_path):
    """Get the texts that the same server gives without the speculator; /metrics shows the acceptance."""
    *ways, prompts = what(request)
    texts = []
    for options in ways:
        with server(tmp_path / "log", *options) as url:
            with ThreadPoolExecutor(2) as pool:
                texts.append(list(pool.map(partial(complete, url), prompts)))
            if options is ways[-1]:
                command = [sys.executable, str(ROOT / "recipes/serve/acceptance.py"), "--url", url]
                said = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert texts[0] == texts[1] and all(texts[0])
    assert said.returncode == 0, said.stderr
    assert 1.3 < float(re.search(r"(\S+) tokens per step", said.stdout)[1]) < 4
    print(said.stdout)
