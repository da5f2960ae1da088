"""Serves prompts of token ids once, by vLLM on a CPU: python offline.py ASKED ANSWER, files of JSON."""

import json
import sys

import cpu_harness


def main() -> None:
    asked = json.loads(open(sys.argv[1]).read())
    cpu_harness.install()
    from vllm import LLM, SamplingParams

    llm = LLM(**asked["engine"], dtype="float32", enforce_eager=True, max_model_len=128, disable_log_stats=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    requests = [
        SamplingParams(**{"ignore_eos": True, "detokenize": False} | sampling) for sampling in asked["sampling"]
    ]
    outputs = llm.generate(prompts, requests)
    texts = [[list(choice.token_ids) for choice in output.outputs] for output in outputs]
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    with open(sys.argv[2], "w") as file:
        json.dump({"texts": texts, "metrics": metrics}, file)


if __name__ == "__main__":
    main()
