// A Python module without functions; its INTERFACE says which arguments the implementations take.

#include <Python.h>

#include "tensors.h"

#define SOFTPROMPT_TEXT_OF(name) #name
#define SOFTPROMPT_NAME_OF(name) SOFTPROMPT_TEXT_OF(name)
#define SOFTPROMPT_JOINED(prefix, name) prefix##name
#define SOFTPROMPT_INIT_OF(name) SOFTPROMPT_JOINED(PyInit_, name)

PyMODINIT_FUNC SOFTPROMPT_INIT_OF(SOFTPROMPT_MODULE)() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, SOFTPROMPT_NAME_OF(SOFTPROMPT_MODULE), nullptr, -1, nullptr, nullptr, nullptr,
      nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "INTERFACE", SOFTPROMPT_INTERFACE) < 0) {
    Py_DECREF(module);
    module = nullptr;
  }
  return module;
}
