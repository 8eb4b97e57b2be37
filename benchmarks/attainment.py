"""SLO attainment of vLLM at the best of three token budgets and of vLLM with slos-serve, on a real engine.

python benchmarks/attainment.py --quick        a quarter of an hour, two rates
python benchmarks/attainment.py --hours 3      five rates, eight paired seeds; resumes where it stopped
"""

from __future__ import annotations

import sys

from slos_serve.bench.study import main

if __name__ == "__main__":
    sys.exit(main())
