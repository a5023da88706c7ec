// The table of the loops. Compiled once for each instruction set: KERNELS names the table, VECTOR_BYTES the width of a
// vector.
#include "kernels.h"

#include "bits.h"
#include "codes.h"
#include "panel.h"
#include "sampled.h"
#include "single.h"

namespace jaxprune {

const Kernels KERNELS = {&Panel,      &ScratchFloats, &Vector,  &Arrange, &BitProduct,
                         &Transposed, &Encode,        &Lay,     &Sampled, ISA_NAME,
                         kUnit,       kPanel};

}  // namespace jaxprune
