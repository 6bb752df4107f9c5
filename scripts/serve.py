#!/usr/bin/env python
r"""Start transformers' own OpenAI-compatible server with MinGRU registered.

    python scripts/serve.py runs/demo --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "runs/demo", "prompt": "ROMEO:"}'

Needs `pip install "transformers[serving]"`. The options are those of `transformers serve`; --help lists them. Chat
requests, such as those of `transformers chat`, need a tokenizer with a chat template.
"""

import sys

import transformers
from transformers.cli.transformers import main

import mingru_hf

# The server looks up a model's class in transformers' own namespace.
transformers.MinGRUForCausalLM = mingru_hf.MinGRUForCausalLM

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    try:
        main()
    except (ImportError, OSError) as error:  # the message names the missing extra or the model
        sys.exit(f"serve.py: error: {error}")
