"""For Schemathesis: what a valid body of each image type is. What invalid ones do is for `test_guided.py`."""

import schemathesis
from hypothesis import strategies as st
from tests.server.fakes import picture

from topfive.preprocessing import FORMATS

_SIDES = st.integers(1, 40)

for _form in FORMATS:
    schemathesis.openapi.media_type(
        f"image/{_form.lower()}",
        st.builds(picture, st.integers(0, 255), size=st.tuples(_SIDES, _SIDES), form=st.just(_form)),
    )
