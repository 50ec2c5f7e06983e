// The Python module. Importing it registers the implementations; it has nothing to call.

#define SOFTPROMPT_MODULE _native_cuda
#include "../module.h"
