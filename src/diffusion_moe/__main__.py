"""`python -m diffusion_moe` is the command `diffusion-moe`."""

import sys

from .cli import main

sys.exit(main())
