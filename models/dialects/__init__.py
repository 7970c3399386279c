"""One module per family of public checkpoints: key patterns, configuration, renamed tensors.

`DIALECTS` is the whole list; the first one whose signature matches reads the file. To add a family, write its module
and put it here (docs/adding.md walks through it).
"""

from srdeploy.models.dialects import (
    basicsr_rcan,
    lornatang_rcan,
    lornatang_srdensenet,
    loseall_rcan,
    native,
    official_rcan,
    rcan_it,
    rdst_srdensenet,
    twtygqyy_srdensenet,
    wxywhu_srdensenet,
    yjn870_rcan,
    yjn870_srdensenet,
    zfhuang_srdensenet,
)
from srdeploy.models.dialects.base import Dialect

DIALECTS: tuple[Dialect, ...] = (
    loseall_rcan.DIALECT,
    rdst_srdensenet.DIALECT,
    rcan_it.DIALECT,
    official_rcan.DIALECT,
    official_rcan.UNSHUFFLE,
    basicsr_rcan.DIALECT,
    yjn870_rcan.DIALECT,
    lornatang_rcan.DIALECT,
    lornatang_rcan.FIRST,
    yjn870_srdensenet.DIALECT,
    wxywhu_srdensenet.V1,
    wxywhu_srdensenet.V2,
    twtygqyy_srdensenet.GEOSR,
    twtygqyy_srdensenet.PRELU,
    twtygqyy_srdensenet.RELU,
    twtygqyy_srdensenet.FIRST,
    lornatang_srdensenet.DIALECT,
    lornatang_srdensenet.EARLY,
    zfhuang_srdensenet.DIALECT,
    native.DIALECT,
)
