"""`python -m flows ...` is Prefect's own command, `prefect ...`, on the board of this project where one runs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("prefect", run_name="__main__")
