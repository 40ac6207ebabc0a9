"""Makes the tables, figures and page of this folder again, and says what differs from when they were made.

    python rebuild.py [--runs DIR]

Needs clbench, and the records that tables/records.csv names. The command that made the folder, from there:

    clbench report --runs runs --out .
"""

from clbench.report.rebuild import rebuild

RUNS = "runs"
CHOICE = {}
VERSIONS = {"clbench": "0.1.0", "matplotlib": "3.11.2", "numpy": "2.4.6", "scipy": "1.17.1"}

if __name__ == "__main__":
    raise SystemExit(rebuild(__file__, RUNS, CHOICE, VERSIONS))
