// Logits of a GGUF model for a list of token ids, through llama.cpp's public interface.
//
//     llama_logits MODEL.gguf TOKENS OUTPUT STEP
//
// TOKENS holds ids separated by blanks. They are decoded STEP at a time; OUTPUT gets one row of
// float32 logits per token. Keys, values and attention are kept in float32, as in our model. With
// a STEP of 0, TOKENS is a text instead, and OUTPUT gets the ids that llama.cpp reads in it.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "llama.h"

int main(int argc, char ** argv) {
    if (argc != 5) {
        std::fprintf(stderr, "usage: %s MODEL.gguf TOKENS OUTPUT STEP\n", argv[0]);
        return 2;
    }
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) {
        return 1;
    }
    std::ifstream input(argv[2], std::ios::binary);
    std::vector<llama_token> tokens;
    const int step = std::atoi(argv[4]);
    if (step == 0) {
        const std::string text((std::istreambuf_iterator<char>(input)), {});
        tokens.resize(text.size() + 1);
        const int count = llama_tokenize(
            llama_model_get_vocab(model), text.data(), text.size(), tokens.data(), tokens.size(),
            false, true);
        std::ofstream ids(argv[3]);
        for (int i = 0; i < count; ++i) {
            ids << tokens[i] << ' ';
        }
        llama_model_free(model);
        return ids.good() && count >= 0 ? 0 : 1;
    }
    for (llama_token token; input >> token;) {
        tokens.push_back(token);
    }
    const int total = static_cast<int>(tokens.size());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = total + 1;
    params.n_batch = total;
    params.n_ubatch = total;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (context == nullptr) {
        return 1;
    }
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::ofstream output(argv[3], std::ios::binary);
    llama_batch batch = llama_batch_init(total, 0, 1);
    for (int start = 0; start < total; start += step) {
        batch.n_tokens = std::min(step, total - start);
        for (int i = 0; i < batch.n_tokens; ++i) {
            batch.token[i] = tokens[start + i];
            batch.pos[i] = start + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch) != 0) {
            return 1;
        }
        for (int i = 0; i < batch.n_tokens; ++i) {
            output.write(
                reinterpret_cast<const char *>(llama_get_logits_ith(context, i)),
                vocab * sizeof(float));
        }
    }
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    return output.good() ? 0 : 1;
}
