"""Makes the table of results: `python tests/models/regenerate.py [MODEL ...]`, of some models or of all."""

import argparse
import logging
import sys
import warnings
from pathlib import Path


def main() -> None:
    """Walks models and writes what was found into the table; what is not walked keeps its line."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    import torch
    import transformers
    from model_walk.models import all_models
    from model_walk.scenarios import SCENARIOS
    from model_walk.table import read_table, table_version, write_table
    from model_walk.walk import walk

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names in the table; all by default")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="only this one; may be repeated")
    parser.add_argument("--missing", action="store_true", help="only what the table does not hold yet")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = read_table() if table_version() == transformers.__version__ else {}
    for entry in all_models():
        if options.models and entry.name not in options.models:
            continue
        for implementation, scenario in entry.walks:
            key = (entry.name, implementation, scenario)
            if (options.scenario and scenario not in options.scenario) or (options.missing and key in results):
                continue
            result = walk(entry, implementation, scenario)
            results[key] = result.outcome
            print(*key, result.outcome, result.complaint, sep=" | ", flush=True)  # noqa: T201
            write_table(results, SCENARIOS, transformers.__version__)


if __name__ == "__main__":
    main()
