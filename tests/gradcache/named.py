"""InfoNCE of one positive and of several, which reach different parts of the machinery."""

from gradcache import InfoNCE

NAMED = {"info_nce": InfoNCE(), "info_nce_multi": InfoNCE(positives="mean")}
