// The Python module. Importing it registers the implementations; it has nothing to call.

#include <Python.h>

#include "../tensors.h"

extern "C" PyMODINIT_FUNC PyInit__native_cpu() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddIntConstant(module, "INTERFACE", SOFTPROMPT_INTERFACE) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
