// Text <-> tokens: the artefact's tokenizer.json and chat_template.jinja.
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";

const MARK = "ANSWER";

export class Text {
  static async open(load, manifest) {
    if (!manifest.tokenizer) throw new Error("the artefact has no tokenizer: export a model that has one");
    const read = async (name) => new TextDecoder().decode(await load(name));
    const settings = "tokenizer_config.json" in manifest.files ? JSON.parse(await read("tokenizer_config.json")) : {};
    const tokenizer = new Tokenizer(JSON.parse(await read("tokenizer.json")), settings);
    return new Text(tokenizer, manifest, "chat_template.jinja" in manifest.files ? await read("chat_template.jinja") : null);
  }

  constructor(tokenizer, manifest, template) {
    this.tokenizer = tokenizer;
    this.stops = manifest.tokenizer.eos_token_ids;
    this.template = template && new Template(template);
    const name = (id) => (id === undefined || id === null ? "" : tokenizer.id_to_token(id));
    this.special = { bos_token: name(manifest.tokenizer.bos_token_id), eos_token: name(this.stops[0]) };
  }

  encode(text, add_special_tokens = true) {
    return Array.from(this.tokenizer.encode(text, { add_special_tokens }).ids);
  }

  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  // Tokens of a message. `first`: of the stream; later ones also close the answer before, whose text is not needed.
  message(content, first) {
    const render = (roles, ask) => this.template.render({
      messages: roles.map(([role, content]) => ({ role, content })), add_generation_prompt: ask, ...this.special,
    });
    if (first) return this.encode(render([["user", content]], true), false);
    const before = [["user", "Hello"], ["assistant", MARK]];
    const whole = render([...before, ["user", content]], true);
    return this.encode(whole.slice(whole.indexOf(MARK) + MARK.length), false);
  }

  // A function: token -> the text that became whole with it.
  stream() {
    let ids = [], old = 0, shown = "";
    return (id) => {
      ids.push(id);
      const text = this.decode(ids);
      // A character has up to four bytes, which may be tokens of their own.
      if (text.endsWith("\ufffd") && ids.length - old < 4) return "";
      const piece = text.slice(shown.length);
      ids = ids.slice(old); // the newest piece stays, because decoders look at neighbours
      old = ids.length;
      shown = this.decode(ids);
      return piece;
    };
  }
}
