# CUDA part of the native module: csrc/cuda/*.cu, built if nvcc works.
#
# FLMOE_CUDA=ON   builds it; without a working nvcc this is an error
# FLMOE_CUDA=OFF  does not build it
# FLMOE_CUDA=AUTO builds it if possible. The package must install on every machine, so an nvcc that cannot
#                 compile (too old, or a host compiler that it does not support) is only a warning.
#
# Defines the header cuda_build.h, the target flmoe_cuda if CUDA is built, and flmoe_link_cuda(module).

set(FLMOE_CUDA AUTO CACHE STRING "Build the CUDA kernels: ON, OFF or AUTO")
# The version of release wheels, the first with sm_100, sm_120 and --compress-mode.
set(oldest_nvcc 12.8)
# Machine code for the supported architectures, and PTX for the oldest of them. Newer GPUs compile the PTX at first
# use; the kernels use no newer instructions.
set(cuda_architectures 80 90a 100 120)
set(cuda_ptx 80)
# Folder of cuda_build.h, which contains the results of this file.
set(cuda_build_folder ${CMAKE_CURRENT_BINARY_DIR}/generated)
set(cuda_names "")
set(cuda_reason "")

# Sets cuda_reason: empty if nvcc compiles and links a program that uses the needed headers and libraries.
macro(flmoe_try_cuda)
  # CMake's own list of architectures is not used: the options below list them.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  include(CheckLanguage)
  # The build folder caches that no compiler was found; search again, because one may be installed by now.
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    if(DEFINED ENV{CUDACXX} AND NOT "$ENV{CUDACXX}" STREQUAL "")
      set(cuda_reason "$ENV{CUDACXX} cannot compile a program here (if it does not support the host compiler, set CUDAHOSTCXX=/path/to/g++)")
    else()
      set(cuda_reason "nvcc was not found")
    endif()
  else()
    enable_language(CUDA)
    find_package(CUDAToolkit QUIET)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS oldest_nvcc)
      set(cuda_reason "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than ${oldest_nvcc}")
    elseif(NOT TARGET CUDA::cudart_static)
      set(cuda_reason "the CUDA toolkit has no libcudart_static")
    else()
      set(probe ${CMAKE_CURRENT_BINARY_DIR}/flmoe_cuda_probe.cu)
      file(WRITE ${probe}
        "#include <cub/block/block_scan.cuh>\n#include <cuda_fp16.h>\nint main() { return 0; }\n")
      try_compile(cuda_compiles ${CMAKE_CURRENT_BINARY_DIR}/flmoe_cuda_probe ${probe}
        CMAKE_FLAGS -DCMAKE_CUDA_STANDARD=17 -DCMAKE_CUDA_ARCHITECTURES=OFF
        OUTPUT_VARIABLE cuda_log)
      if(NOT cuda_compiles)
        message(STATUS "${cuda_log}")
        set(cuda_reason "nvcc cannot compile a program with CUB here, see above")
      endif()
    endif()
  endif()
endmacro()

if(FLMOE_CUDA STREQUAL "OFF")
  set(cuda_reason "FLMOE_CUDA=0")
else()
  flmoe_try_cuda()
endif()

if(cuda_reason)
  set(message "flmoe_kernels: CUDA kernels are not built: ${cuda_reason}.")
  if(FLMOE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "error: FLMOE_CUDA=1 requires the CUDA kernels, but ${cuda_reason}.")
  elseif(FLMOE_CUDA STREQUAL "AUTO" AND DEFINED ENV{CUDACXX} AND NOT "$ENV{CUDACXX}" STREQUAL "")
    message(WARNING "${message}")
  else()
    message(STATUS "${message}")
  endif()
else()
  set(cuda_options "")
  foreach(architecture IN LISTS cuda_architectures)
    list(APPEND cuda_options
      "SHELL:-gencode arch=compute_${architecture},code=sm_${architecture}")
  endforeach()
  list(APPEND cuda_options "SHELL:-gencode arch=compute_${cuda_ptx},code=compute_${cuda_ptx}")

  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
  add_library(flmoe_cuda OBJECT ${cuda_sources})
  set_target_properties(flmoe_cuda PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_ARCHITECTURES OFF
    CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(flmoe_cuda PRIVATE csrc ${cuda_build_folder})
  # Uncompressed, the code is four to eight times as large. "size" is half of "speed", but of the drivers for CUDA 12
  # only those since 12.4 read it.
  set(compression --compress-mode=size)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0)
    set(compression --compress-mode=speed -Xfatbin=-compress-all)
  endif()
  target_compile_options(flmoe_cuda PRIVATE ${cuda_options} ${compression} -Xcompiler=-Wall,-Wextra)
  list(JOIN cuda_architectures " sm_" cuda_names)
  set(cuda_names "sm_${cuda_names}, PTX ${cuda_ptx}")
  message(STATUS
    "flmoe_kernels: CUDA kernels for ${cuda_names} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}.")
endif()

# A header instead of definitions on the command line, because the reason may contain any character.
file(CONFIGURE OUTPUT ${cuda_build_folder}/cuda_build.h @ONLY CONTENT [=[
// Results of csrc/cuda/cuda.cmake.
#pragma once

namespace flmoe {

// The architectures if the CUDA kernels are built, otherwise the reason; the other string is empty.
inline constexpr char kCudaArchitectures[] = R"flmoe(@cuda_names@)flmoe";
inline constexpr char kCudaReason[] = R"flmoe(@cuda_reason@)flmoe";
// The oldest compute capability that runs the kernels, that of the PTX: 80 for sm_80.
inline constexpr int kCudaOldest = @cuda_ptx@;

}  // namespace flmoe
]=])

target_include_directories(flmoe_flags INTERFACE ${cuda_build_folder})
if(TARGET flmoe_cuda)
  target_compile_definitions(flmoe_flags INTERFACE FLMOE_HAVE_CUDA=1)
endif()

# Links the CUDA kernels into a module, if they are built.
function(flmoe_link_cuda module)
  if(NOT TARGET flmoe_cuda)
    return()
  endif()
  target_sources(${module} PRIVATE $<TARGET_OBJECTS:flmoe_cuda>)
  # The CUDA runtime is linked statically, so that the module loads on machines without a driver. Its symbols
  # are hidden, so that they cannot conflict with those of torch's CUDA runtime.
  target_link_libraries(${module} PRIVATE CUDA::cudart_static)
  set_target_properties(${module} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_options(${module} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()
