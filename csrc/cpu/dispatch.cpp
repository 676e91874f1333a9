// Tells which instruction set the CPU ops use, for tests and `prismer info`.

#include "dispatch.h"

namespace prismer {

std::string cpu_capability() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace prismer
