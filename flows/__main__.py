"""`python -m flows ...` runs `prefect ...` against this project's board if one is running."""

import runpy

if __name__ == "__main__":
    runpy.run_module("prefect", run_name="__main__")
