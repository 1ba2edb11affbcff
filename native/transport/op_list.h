// op_list.h owns the lists that channels keep operations in, and what of a descriptor is payload towards the server.
#pragma once

#include "channel.h"

namespace kvfs {

// FIFO; one may leave from the middle.
struct NetOpList {
  NetOp *head = nullptr, *tail = nullptr;
  void push(NetOp* op) {
    op->next = nullptr;
    op->prev = tail;
    (tail != nullptr ? tail->next : head) = op;
    tail = op;
  }
  void remove(NetOp* op) {
    (op->prev != nullptr ? op->prev->next : head) = op->next;
    (op->next != nullptr ? op->next->prev : tail) = op->prev;
  }
  void append(NetOpList* other) {
    if (other->head == nullptr) return;
    other->head->prev = tail;
    (tail != nullptr ? tail->next : head) = other->head;
    tail = other->tail;
    *other = {};
  }
};

struct ServerOpList {  // FIFO
  ServerOp *head = nullptr, *tail = nullptr;
  void push(ServerOp* op) {
    op->next = nullptr;
    (tail != nullptr ? tail->next : head) = op;
    tail = op;
  }
  ServerOp* pop() {
    ServerOp* op = head;
    head = op->next;
    if (head == nullptr) tail = nullptr;
    op->next = nullptr;
    return op;
  }
};

inline uint32_t payload_in(const wire::Desc& d) { return wire::has_in(wire::Op{d.op}) ? d.len : 0; }

}  // namespace kvfs
