"""`PYTHONPATH=tests/programs python -m ways [WORD]`: runs all ways, names what is wrong, and prints the table."""

import sys
import warnings
from collections import Counter

import pyro
import torch

from ways import judge, load, table


def main() -> None:
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    wanted, count = sys.argv[1] if len(sys.argv) > 1 else "", Counter()
    for name, found in load().items():
        if wanted not in name:
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(20261121)
        try:
            outcome, why = judge(found.make(), found.refusal)
        except Exception as error:
            outcome, why = "wrong", f"{type(error).__name__}: {error}"
        count[found.kind, outcome] += 1
        if outcome == "wrong" or wanted:
            print(f"{outcome}: {name}\n    {why}", flush=True)
    print("\n".join(table(count)))


main()
