# GGML_BACKEND_DL: ggml as shared libraries in ai4all/libs beside the extension, and each backend
# as one that is loaded when the engine starts. llama.cpp itself stays inside the extension.

# A source build is tuned to its machine. ggml's own GGML_NATIVE does not go with loadable
# backends, so the one CPU backend is compiled for this machine below.
set(_tune OFF)
if(NOT GGML_CPU_ALL_VARIANTS AND NOT CMAKE_CROSSCOMPILING AND (NOT DEFINED GGML_NATIVE OR GGML_NATIVE))
  set(_tune ON)
  foreach(_level IN ITEMS SSE42 AVX AVX2 BMI2 FMA F16C)
    set(GGML_${_level} OFF)
  endforeach()
  if(GGML_CUDA AND NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    execute_process(COMMAND nvidia-smi -L OUTPUT_VARIABLE _gpus ERROR_QUIET)
    if(_gpus MATCHES "GPU 0")
      set(CMAKE_CUDA_ARCHITECTURES native)
    endif()
  endif()
endif()
set(GGML_NATIVE OFF)

# What llama.cpp sets before it adds ggml.
if(NOT DEFINED GGML_LLAMAFILE)
  set(GGML_LLAMAFILE_DEFAULT ON)
endif()
if(NOT DEFINED GGML_CUDA_GRAPHS)
  set(GGML_CUDA_GRAPHS_DEFAULT ON)
endif()

set(BUILD_SHARED_LIBS ON)
add_subdirectory("${_llama_dir}/ggml" "${CMAKE_CURRENT_BINARY_DIR}/ggml" EXCLUDE_FROM_ALL)
set(BUILD_SHARED_LIBS OFF)

set(AI4ALL_BACKENDS "")
foreach(_backend IN LISTS GGML_AVAILABLE_BACKENDS)
  if(TARGET ${_backend})
    list(APPEND AI4ALL_BACKENDS ${_backend})
  endif()
endforeach()

# Names of our own: two libraries of one soname are one to the loader, and another package in the
# same process may bring its own ggml.
foreach(_library IN ITEMS ggml ggml-base)
  set_target_properties(${_library} PROPERTIES OUTPUT_NAME ai4all-${_library})
endforeach()
set(AI4ALL_ORIGIN "$ORIGIN")
if(APPLE)
  set(AI4ALL_ORIGIN "@loader_path")
endif()
foreach(_library IN LISTS AI4ALL_BACKENDS ITEMS ggml ggml-base)
  set_property(TARGET ${_library} PROPERTY VERSION)
  set_property(TARGET ${_library} PROPERTY SOVERSION)
  set_target_properties(${_library} PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/libs"
    INSTALL_RPATH "${AI4ALL_ORIGIN}"
    INSTALL_RPATH_USE_LINK_PATH ON)
endforeach()
if(TARGET ggml-cuda)
  # NVIDIA's own wheels, where they serve in place of a toolkit.
  set_target_properties(ggml-cuda PROPERTIES INSTALL_RPATH "$ORIGIN;$ORIGIN/../../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib")
endif()
if(_tune)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64|i.86)$")
    target_compile_options(ggml-cpu PRIVATE -march=native)
  else()
    target_compile_options(ggml-cpu PRIVATE -mcpu=native)
  endif()
endif()
