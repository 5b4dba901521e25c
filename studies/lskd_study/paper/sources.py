"""Who proposed a measure, or used it so, by its name in files."""

_XIA, _STANTON = "Xia et al., ICLR 2025", "Stanton et al., NeurIPS 2021"
SOURCES = {
    "top1": "Table 8",
    "nll": "Menon et al., ICML 2021; Kim, 2025",
    "ece": "Guo et al., ICML 2017",
    "aurc": f"Geifman et al., ICLR 2019; {_XIA}",
    "aurc_normalised": f"Cattelan and Silva, UAI 2024; {_XIA}",
    "dark_knowledge": "Li et al., NeurIPS 2022",
    "agreement": _STANTON,
    "divergence": _STANTON,
    "target_std": "Table 1",
    "vector_l2": "Eq. 2",
    "between_vector_l2": "Eq. 5",
    "between_target_std": "Table 10",
}
