"""The torch side of serving.py, which starts it: a folder of compressed-tensors in transformers.

Needs torch, transformers, accelerate and compressed-tensors, and nothing of this library.
"""

import json
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import load_file


def main() -> None:
    folder, wanted_path, out, tokens = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        # The first pass decompresses the layers.
        logits = model(torch.tensor([json.loads(tokens)])).logits[0].float()
    np.save(out, torch.log_softmax(logits, -1).numpy())
    found, wanted = model.state_dict(), load_file(wanted_path)
    equal = sum(name in found and torch.equal(found[name].cpu(), w) for name, w in wanted.items())
    print(f"{equal}/{len(wanted)}")


if __name__ == "__main__":
    main()
