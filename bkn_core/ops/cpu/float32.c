/* The passes over float32. */

#include "activation.h"

typedef float Element;

static inline float load(Element value)
{
    return value;
}

static inline Element store(float value)
{
    return value;
}

#define PASSES bkn_float32
#include "planes.h"
#include "rows.h"
