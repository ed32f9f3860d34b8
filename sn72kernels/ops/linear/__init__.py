"""Linear layer on int8 or fp8 codes with scales, bias and GELU."""
