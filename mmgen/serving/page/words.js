// Every text of the page, as [English, Chinese]; {name} is filled in from the arguments.
const WORDS = {
  tagline: ["Draw, edit and talk with a small image model", "用小型图像模型绘画、修改、对话"],
  tabs: ["Views", "视图"],
  draw: ["Draw", "绘画"], edit: ["Edit", "修改"], talk: ["Talk", "对话"], gallery: ["Gallery", "图库"],
  other_lang: ["中文", "English"], theme: ["Light or dark", "明暗主题"],
  ready: ["Ready", "就绪"], warming: ["Warming up", "正在预热"], offline: ["Not reachable", "无法连接"],
  prompt: ["What should the picture show?", "想画什么？"],
  prompt_hint: ["a red circle above a blue square", "蓝色方块上面有一个红色圆形"],
  prompt_edit: ["What should change?", "想怎么改？"],
  prompt_edit_hint: ["make the circle green", "把圆形变成绿色"],
  enter_hint: ["Enter sends, Shift+Enter starts a new line, Escape stops.", "回车发送，Shift+回车换行，Esc 停止。"],
  size: ["Size", "尺寸"], auto: ["automatic", "自动"], seed: ["Seed", "种子"], random: ["random", "随机"],
  guidance: ["Guidance", "引导强度"], number: ["Pictures", "张数"], stop: ["Stop", "停止"],
  draw_empty: ["Your pictures appear here and sharpen as they arrive.", "图片会显示在这里，并逐渐变得清晰。"],
  edit_empty: ["The changed pictures appear here.", "修改后的图片会显示在这里。"],
  gallery_empty: ["Nothing yet. Every finished picture of this visit is kept here until you close the page.", "还没有图片。本次访问完成的图片会保留在这里，直到关闭页面。"],
  talk_empty: ["Ask for a picture, then ask for changes, or send a picture and ask about it.", "先要一张图，再提出修改；也可以发一张图来提问。"],
  choose: ["Choose a picture", "选择图片"], drop_hint: ["or drop or paste one anywhere on this page", "也可以拖放或粘贴到页面任意位置"],
  paint_hint: ["Paint over what may change. With nothing painted, the whole picture may.", "涂抹可以修改的地方；不涂则整张图都可以修改。"],
  painting: ["Picture with the painted area", "图片与涂抹区域"],
  brush: ["Brush", "画笔"], erase: ["Erase", "擦除"], clear: ["Clear", "清空"],
  message: ["Message", "消息"], message_hint: ["draw a yellow star", "画一颗黄色的星星"],
  send: ["Send", "发送"], undo: ["Undo last turn", "撤销上一轮"], fresh: ["New dialogue", "新对话"], attach: ["Add a picture", "添加图片"],
  user: ["You", "你"], assistant: ["Model", "模型"], remove: ["Remove this picture", "移除这张图片"],
  attached: ["Attached picture", "附上的图片"],
  again: ["Reuse", "再次使用"], download: ["Save", "下载"], copy: ["Copy recipe", "复制参数"],
  copied: ["Copied", "已复制"], copy_failed: ["Not allowed", "无法复制"],
  seed_is: ["seed {seed}", "种子 {seed}"], guidance_is: ["guidance {guidance}", "引导 {guidance}"], took: ["{seconds} s", "{seconds} 秒"],
  drawing: ["Drawing…", "正在绘制…"], thinking: ["Thinking…", "正在思考…"], done: ["Done in {seconds} s.", "完成，用时 {seconds} 秒。"],
  stopped: ["Stopped.", "已停止。"], failed: ["Not finished", "未完成"], declined: ["Not drawn", "未绘制"],
  need_prompt: ["Please say in words what you would like.", "请先用文字描述。"],
  need_picture: ["Please choose a picture first.", "请先选择一张图片。"],
  not_picture: ["This file could not be read as a picture.", "无法把这个文件读作图片。"],
  refused: ["This one I would rather not draw", "这张图不太适合画"],
  refused_hint: ["Change the words a little and try again.", "换个说法再试试吧。"],
  busy: ["Many pictures are being drawn just now", "现在绘制的人有点多"],
  unavailable: ["The server is not ready yet", "服务器还没准备好"],
  network: ["The server did not answer", "服务器没有响应"], network_hint: ["Is it running, and is this device still online?", "请确认服务器正在运行，并且设备已联网。"],
  cut: ["The connection ended early", "连接提前中断"], error: ["Something went wrong", "出了点问题"],
  retry_in: ["Trying again in {seconds} s.", "{seconds} 秒后自动重试。"], retry: ["Try again now", "立即重试"],
  key_title: ["This server asks for a key", "服务器需要密钥"], key_wrong: ["That key was not accepted", "密钥未被接受"],
  key: ["API key", "API 密钥"], key_hint: ["Kept in this browser tab only.", "只保存在当前标签页中。"],
  ok: ["Continue", "继续"], cancel: ["Cancel", "取消"],
};

// localStorage or sessionStorage by name; a browser that forbids storage just forgets.
export function stored(area, name, value) {
  try {
    if (value !== undefined) window[area].setItem(`mmgen.${name}`, value);
    return window[area].getItem(`mmgen.${name}`);
  } catch { return value ?? null; }
}

let language = stored("localStorage", "language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");

export const text = (key, args = {}) =>
  WORDS[key][language === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (_, name) => args[name]);

// A node remembers its word (data-word) and the arguments, so a change of language rewrites it in place.
export function setWord(node, key, args = {}) {
  node.dataset.word = key;
  node.dataset.args = JSON.stringify(args);
  node.textContent = text(key, args);
}

export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]"))
    node.textContent = text(node.dataset.word, JSON.parse(node.dataset.args ?? "{}"));
  for (const name of ["placeholder", "aria-label", "title"])
    for (const node of document.querySelectorAll(`[data-word-${name}]`))
      node.setAttribute(name, text(node.getAttribute(`data-word-${name}`)));
}

export function toggleLanguage() {
  language = stored("localStorage", "language", language === "zh" ? "en" : "zh");
  translate();
}
