// The last group of its query rows to arrive goes on, with what all of them have stored. Counters begin at 0.
KVQ_SHARED_ARRAY(kvq_uint, shared_arrived, 1);
KVQ_FENCE();
KVQ_BARRIER();
if (KVQ_THREAD == 0)
  shared_arrived[0] = kvq_arrive(counters + (batch * KVQ_HEADS + head) * KVQ_QUERY_TILES + KVQ_GROUP_Y % KVQ_QUERY_TILES);
KVQ_BARRIER();
if ((int)shared_arrived[0] + 1 < splits) return;
KVQ_FENCE();
