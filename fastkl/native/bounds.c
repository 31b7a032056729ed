#include "functions.h"

#ifdef FLOAT64
const REAL exp_bounds[2] = {-708.7, 710.0};
#else
const REAL exp_bounds[2] = {-87.3f, 89.0f};
#endif
