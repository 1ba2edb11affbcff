# find_package(hf3fs_usrbio) gives hf3fs_usrbio::hf3fs_api_shared. Relocatable: the package directory is wherever pip put it.
get_filename_component(_hf3fs_usrbio_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET hf3fs_usrbio::hf3fs_api_shared)
  add_library(hf3fs_usrbio::hf3fs_api_shared SHARED IMPORTED)
  set_target_properties(hf3fs_usrbio::hf3fs_api_shared PROPERTIES
    IMPORTED_LOCATION "${_hf3fs_usrbio_root}/lib/libhf3fs_api_shared.so"
    IMPORTED_SONAME libhf3fs_api_shared.so
    INTERFACE_INCLUDE_DIRECTORIES "${_hf3fs_usrbio_root}/include")
endif()
unset(_hf3fs_usrbio_root)
