"""Failed checks of the helpers show their values, as those of tests do."""

import pytest

pytest.register_assert_rewrite("golden_cases")
