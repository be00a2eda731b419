#include "bindings/border.h"

namespace flmoe::bindings {

namespace {

Py_ssize_t size_of(const py::tuple& t) {
  return PyTuple_GET_SIZE(t.ptr());
}
PyObject* item(const py::tuple& t, Py_ssize_t i) {
  return PyTuple_GET_ITEM(t.ptr(), i);
}

bool all_empty(const py::tuple& dicts) {
  for (Py_ssize_t i = 0; i < size_of(dicts); ++i)
    if (!PyDict_Check(item(dicts, i)) || PyDict_Size(item(dicts, i)) != 0) return false;
  return true;
}

// Compares the values of dictionaries with recorded ones, in order. `recorded` has `end` after each
// dictionary; its value `any` stands for all values.
template <typename Same>
bool compare(const py::tuple& dicts, const py::tuple& recorded, py::handle any, py::handle end,
             const Same& same) {
  const Py_ssize_t size = size_of(recorded);
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < size_of(dicts); ++i) {
    if (!PyDict_Check(item(dicts, i))) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(item(dicts, i), &position, &key, &value)) {
      if (at == size) return false;
      PyObject* expected = item(recorded, at++);
      if (expected != any.ptr() && !same(value, expected)) return false;
    }
    if (at == size || item(recorded, at++) != end.ptr()) return false;
  }
  return at == size;
}

bool same_values(const py::tuple& dicts, const py::tuple& values, py::handle any, py::handle end) {
  return compare(dicts, values, any, end, [](PyObject* a, PyObject* b) { return a == b; });
}

bool is_type_of(PyObject* value, PyObject* type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(value)) == type;
}

bool same_types(const py::tuple& dicts, const py::tuple& types, py::handle any, py::handle end) {
  return compare(dicts, types, any, end, is_type_of);
}

// Whether objects have these classes and these instance dictionaries.
bool same_objects(const py::tuple& objects, const py::tuple& classes, const py::tuple& dicts) {
  for (Py_ssize_t i = 0; i < size_of(objects); ++i) {
    if (!is_type_of(item(objects, i), item(classes, i))) return false;
    const auto dict =
        py::reinterpret_steal<py::object>(PyObject_GenericGetDict(item(objects, i), nullptr));
    if (!dict) throw py::error_already_set();
    if (dict.ptr() != item(dicts, i)) return false;
  }
  return true;
}

// Version numbers of dictionaries. CPython changes them when an item is set or deleted. Empty
// for releases of CPython without such numbers.
py::bytes dict_versions(const py::tuple& dicts) {
#if PY_VERSION_HEX < 0x030D0000
  std::vector<uint64_t> versions(size_of(dicts));
  for (Py_ssize_t i = 0; i < size_of(dicts); ++i) {
    if (!PyDict_Check(item(dicts, i))) throw py::type_error("dicts: expected dictionaries");
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    versions[i] = reinterpret_cast<PyDictObject*>(item(dicts, i))->ma_version_tag;
#pragma GCC diagnostic pop
  }
  return {reinterpret_cast<const char*>(versions.data()), versions.size() * sizeof(uint64_t)};
#else
  return {};
#endif
}

// CPython gives a class a new version when one of its attributes, or one of its base classes', is
// set or deleted; 0 until an attribute is looked up.
py::tuple class_versions(const py::tuple& classes) {
  py::tuple versions(size_of(classes));
  for (Py_ssize_t i = 0; i < size_of(classes); ++i) {
    if (!PyType_Check(item(classes, i))) throw py::type_error("classes: expected classes");
    versions[i] = reinterpret_cast<PyTypeObject*>(item(classes, i))->tp_version_tag;
  }
  return versions;
}

}  // namespace

void bind_snapshot(py::module_& m) {
  m.def("all_empty", all_empty);
  m.def("class_versions", class_versions);
  m.def("dict_versions", dict_versions);
  m.def("same_values", same_values);
  m.def("same_objects", same_objects);
  m.def("same_types", same_types);
}

}  // namespace flmoe::bindings
