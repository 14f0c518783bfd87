"""Host time of launches without a GPU: ``python -m tests.backends.triton.fake_driver.host``.

Triton's real launcher under a fake driver, for each Triton that is there: microseconds per call of
the launchers, and launches and milliseconds of a training step's operators of R50x1. The tensors
are on the CPU, whose allocator returns what is large to the system: read the small maps.
"""

import json

from tests.backends.triton import fake_driver, tritons


def main() -> None:
    for other in (False, True) if tritons.OTHER.exists() else (False,):
        for what in ("time", "step"):
            printed = json.loads(fake_driver.run(what, other))
            print(f"Triton {printed['triton']}")
            result = printed["result"]
            rows = result.items() if isinstance(result, dict) else enumerate(result)
            for name, value in rows:
                print(f"  {name}: {value}" if what == "time" else f"  {value}", flush=True)


if __name__ == "__main__":
    main()
