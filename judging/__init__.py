"""How good images are: figures, the networks that judge, and the digits that the shipped models were trained on."""
