// verbs.h owns the way to the RDMA libraries: VerbsTable, every call that kvfs makes to libibverbs and librdmacm. They are
// loaded at first use, so kvfs is built and runs where they are not installed. Tests put entries of their own into a copy
// of the table, for errors that no device at hand makes.
#pragma once

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#include <string>

namespace kvfs {

// X(member, function of libibverbs)
#define KVFS_VERBS_CALLS(X)                         \
  X(get_device_list, ibv_get_device_list)           \
  X(free_device_list, ibv_free_device_list)         \
  X(get_device_name, ibv_get_device_name)           \
  X(open_device, ibv_open_device)                   \
  X(close_device, ibv_close_device)                 \
  X(query_device, ibv_query_device)                 \
  X(query_gid_ex, _ibv_query_gid_ex)                \
  X(get_async_event, ibv_get_async_event)           \
  X(ack_async_event, ibv_ack_async_event)           \
  X(alloc_pd, ibv_alloc_pd)                         \
  X(dealloc_pd, ibv_dealloc_pd)                     \
  X(dereg_mr, ibv_dereg_mr)                         \
  X(create_comp_channel, ibv_create_comp_channel)   \
  X(destroy_comp_channel, ibv_destroy_comp_channel) \
  X(create_cq, ibv_create_cq)                       \
  X(destroy_cq, ibv_destroy_cq)                     \
  X(get_cq_event, ibv_get_cq_event)                 \
  X(ack_cq_events, ibv_ack_cq_events)               \
  X(create_srq, ibv_create_srq)                     \
  X(destroy_srq, ibv_destroy_srq)                   \
  X(create_qp, ibv_create_qp)                       \
  X(modify_qp, ibv_modify_qp)                       \
  X(destroy_qp, ibv_destroy_qp)                     \
  X(wc_status_str, ibv_wc_status_str)

// X(member, function of librdmacm)
#define KVFS_RDMACM_CALLS(X)                           \
  X(create_event_channel, rdma_create_event_channel)   \
  X(destroy_event_channel, rdma_destroy_event_channel) \
  X(create_id, rdma_create_id)                         \
  X(destroy_id, rdma_destroy_id)                       \
  X(bind_addr, rdma_bind_addr)                         \
  X(resolve_addr, rdma_resolve_addr)                   \
  X(resolve_route, rdma_resolve_route)                 \
  X(listen, rdma_listen)                               \
  X(connect, rdma_connect)                             \
  X(establish, rdma_establish)                         \
  X(accept, rdma_accept)                               \
  X(reject, rdma_reject)                               \
  X(disconnect, rdma_disconnect)                       \
  X(migrate_id, rdma_migrate_id)                       \
  X(init_qp_attr, rdma_init_qp_attr)                   \
  X(get_cm_event, rdma_get_cm_event)                   \
  X(ack_cm_event, rdma_ack_cm_event)                   \
  X(get_src_port, rdma_get_src_port)

struct VerbsTable {
#define KVFS_MEMBER(member, function) decltype(&function) member = nullptr;
  KVFS_VERBS_CALLS(KVFS_MEMBER)
  KVFS_RDMACM_CALLS(KVFS_MEMBER)
#undef KVFS_MEMBER
  // Macros or inline functions over the device's own table in the headers.
  ibv_mr* (*reg_mr)(ibv_pd*, void*, size_t, int access) = nullptr;
  int (*query_port)(ibv_context*, uint8_t port, ibv_port_attr*) = nullptr;
  int (*req_notify_cq)(ibv_cq*, int solicited) = nullptr;
  int (*poll_cq)(ibv_cq*, int n, ibv_wc*) = nullptr;
  int (*post_send)(ibv_qp*, ibv_send_wr*, ibv_send_wr** bad) = nullptr;
  int (*post_recv)(ibv_qp*, ibv_recv_wr*, ibv_recv_wr** bad) = nullptr;
  int (*post_srq_recv)(ibv_srq*, ibv_recv_wr*, ibv_recv_wr** bad) = nullptr;
};

// A table of the libraries of these names. False: *why.
bool load_verbs_from(const char* verbs, const char* cm, VerbsTable* table, std::string* why);

// The libraries' table, the same for the whole process; null where they can't be loaded: *why says what to do.
const VerbsTable* load_verbs(std::string* why);

}  // namespace kvfs
