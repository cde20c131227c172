"Quantization from scratch: the arithmetic, the ranges, the simulation inside the user's own forward."
