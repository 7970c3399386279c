"""The two networks, RCAN and SRDenseNet, and the specifications that configure them."""
